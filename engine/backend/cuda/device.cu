#include "backend/cuda/device.h"

namespace sbd::cuda {

namespace {

__global__ void code_probe() {}

}  // namespace

// What the code was compiled for decides, not the device, which also runs code of 8.0. Graphs keep
// such an overlap from CUDA 12.3 on.
bool may_overlap(const cudaDeviceProp& properties) {
  cudaFuncAttributes code;
  const cudaError_t status = cudaFuncGetAttributes(&code, code_probe);
  cudaGetLastError();
  SBD_CHECK(status == cudaSuccess,
            "this build has no code for {} (compute capability {}.{}): {}; build with "
            "CMAKE_CUDA_ARCHITECTURES={}{}, or use device cpu",
            properties.name, properties.major, properties.minor, cudaGetErrorString(status),
            properties.major, properties.minor);
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  return code.ptxVersion >= 90 && driver >= 12030;
}

}  // namespace sbd::cuda
