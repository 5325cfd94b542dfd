# Decides whether the CUDA backend is built (SBD_WITH_CUDA), and for which GPUs: those that
# CMAKE_CUDA_ARCHITECTURES names, else all (SBD_CUDA=ON) or this machine's (AUTO). It takes minutes,
# so a machine without a GPU builds it only when told to.
set(SBD_WITH_CUDA FALSE)
if(NOT SBD_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "SBD_CUDA is ${SBD_CUDA}: expected ON, OFF or AUTO")
endif()
if(SBD_CUDA STREQUAL "OFF")
  return()
endif()

set(GPUS 80 86 89 90 100 120)  # compute capabilities without their dots
if(SBD_CUDA STREQUAL "AUTO")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE said RESULT_VARIABLE status ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" GPUS "${said}")
  string(REPLACE "." "" GPUS "${GPUS}")
  list(FILTER GPUS EXCLUDE REGEX "^[1-7].$")  # too old for these kernels
  list(REMOVE_DUPLICATES GPUS)
  if(NOT status EQUAL 0 OR NOT GPUS)
    message(STATUS "CUDA backend: left out, no GPU of compute capability 8.0 or newer is here "
      "(SBD_CUDA=ON builds it for all)")
    return()
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(SBD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SBD_CUDA is ON, but no nvcc was found: put it on PATH or set CUDACXX")
  endif()
  message(STATUS "CUDA backend: left out, no nvcc was found: put it on PATH or set CUDACXX")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch
    OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(portable 90-virtual)  # what the driver compiles for a GPU that is not in the list
  foreach(gpu ${GPUS})
    if(known MATCHES "compute_${gpu}\n")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${gpu}-real)
      if(SBD_CUDA STREQUAL "AUTO")
        set(portable)
      endif()
    endif()
  endforeach()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${portable})
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it of nvcc 13
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
find_package(CUDAToolkit REQUIRED)
set(SBD_WITH_CUDA TRUE)
message(STATUS "CUDA backend: for ${CMAKE_CUDA_ARCHITECTURES}")
