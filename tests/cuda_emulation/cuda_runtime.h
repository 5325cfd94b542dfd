// CUDA's words for the emulated GPU: those that the backend uses, no more. Streams are in order and
// every call is done when it returns.
#pragma once

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

// ---- the host's side ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
};
inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
  }
  return "?";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// What a call that waits for the device, or sends it work, returns.
inline cudaError_t state_of_the_device() {
  return emulation::lost() ? cudaErrorIllegalAddress : cudaSuccess;
}

struct EmulatedStream {
  bool capturing = false;
  std::vector<std::function<void()>> captured;
};
struct EmulatedGraph {
  std::vector<std::function<void()>> launches;
};
struct EmulatedEvent {
  std::chrono::steady_clock::time_point time;
};
using cudaStream_t = EmulatedStream*;
using cudaGraph_t = EmulatedGraph*;
using cudaGraphExec_t = EmulatedGraph*;
using cudaEvent_t = EmulatedEvent*;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  std::size_t sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
};
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = emulation::options().n_devices;
  return *n > 0 ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const emulation::Options& all = emulation::options();
  *properties = {"emulated",
                 all.capability,
                 0,
                 all.n_multiprocessors,
                 all.block_shared_bytes,
                 all.block_shared_bytes + 1024};
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace emulation {
cudaError_t allocate(void** data, std::size_t bytes);
cudaError_t release(void* data);
bool may_launch(std::size_t shared_bytes, std::size_t allowed);
}  // namespace emulation

inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  if (emulation::options().n_devices == 0) return cudaErrorNoDevice;
  return emulation::allocate(data, bytes);
}
inline cudaError_t cudaFree(void* data) { return emulation::release(data); }
inline cudaError_t cudaMallocHost(void** data, std::size_t bytes) {
  *data = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(std::size_t* available, std::size_t* total) {
  *total = emulation::options().memory_bytes;
  *available = *total - emulation::used_bytes();
  return cudaSuccess;
}

enum cudaMemcpyKind {
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return state_of_the_device();
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t stream) {
  if (stream->capturing) return cudaErrorInvalidValue;
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                                     std::size_t from_pitch, std::size_t width, std::size_t height,
                                     cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (std::size_t i = 0; i < height && status == cudaSuccess; ++i) {
    status = cudaMemcpyAsync(static_cast<char*>(to) + i * to_pitch,
                             static_cast<const char*>(from) + i * from_pitch, width, kind, stream);
  }
  return status;
}
inline cudaError_t cudaMemsetAsync(void* data, int byte, std::size_t bytes, cudaStream_t) {
  std::memset(data, byte, bytes);
  return state_of_the_device();
}

enum { cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stream->capturing ? cudaErrorInvalidValue : state_of_the_device();
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (emulation::options().n_devices == 0) return cudaErrorNoDevice;
  *event = new EmulatedEvent;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return state_of_the_device();
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return state_of_the_device(); }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->capturing = true;
  stream->captured.clear();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream->capturing = false;
  *graph = new EmulatedGraph{stream->captured};
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long) {
  if (!emulation::options().graphs_fit) return cudaErrorMemoryAllocation;
  *executable = new EmulatedGraph(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  const cudaError_t status = state_of_the_device();  // a kernel of it that fails is seen later
  for (const auto& launch : graph->launches) launch();
  return status;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Args>
std::size_t& shared_bytes_allowed(void (*)(Args...), void* kernel) {
  static std::vector<std::pair<void*, std::size_t>> all;
  for (auto& [known, bytes] : all) {
    if (known == kernel) return bytes;
  }
  return all.emplace_back(kernel, 0).second;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename... Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Args...)) {
  if (!emulation::options().has_code) return cudaErrorNoKernelImageForDevice;
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
template <typename... Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  shared_bytes_allowed(kernel, reinterpret_cast<void*>(kernel)) = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                               const Args& args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const std::size_t shared = config->dynamicSmemBytes;
  const std::size_t allowed = shared_bytes_allowed(kernel, reinterpret_cast<void*>(kernel));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      block.x > 1024 || !emulation::may_launch(shared, allowed)) {
    return cudaErrorInvalidValue;
  }
  if (emulation::lost()) return cudaErrorIllegalAddress;
  const bool overlaps = config->numAttrs > 0;
  const auto run = [=] {
    emulation::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, overlaps,
                        [&] { kernel(args); });
  };
  if (config->stream->capturing) {
    config->stream->captured.push_back(run);
  } else {
    run();
  }
  return cudaSuccess;
}

// ---- the kernels' side ----

inline const emulation::Index3& threadIdx = emulation::thread_index;
inline const emulation::Index3& blockIdx = emulation::block_index;
inline const emulation::Index3& blockDim = emulation::block_size;
inline const emulation::Index3& gridDim = emulation::grid_size;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() {
  emulation::meet_warp("barrier", nullptr, [](void* const*) {});
}
inline void __threadfence() {}

namespace emulation {
template <typename T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulation

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::shuffle(value, lane);
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at = before | value;
  return before;
}
inline int atomicMax(int* at, int value) {
  const int before = *at;
  *at = std::max(before, value);
  return before;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
void __stcg(T* at, T value) {
  *at = value;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> (4 * i) & 7u;
    result |= static_cast<unsigned>(bytes >> (8 * byte) & 255u) << (8 * i);
  }
  return result;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

using std::isfinite;
using std::isinf;
using std::isnan;
