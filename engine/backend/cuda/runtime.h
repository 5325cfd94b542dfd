// The CUDA runtime with errors as exceptions and memory as values.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <utility>

#include "core/error.h"

namespace sbd::cuda {

// Everything a kernel gets is one struct, passed by value; a launch is this and the struct.
struct Grid {
  int x = 1;
  int y = 1;
  int z = 1;
  int threads = 128;
  int shared_bytes = 0;
  bool operator==(const Grid&) const = default;
};

// A CUDA error stays: every later call of the process returns it again, wherever it came from. So
// the first one that is not about memory is recorded, and is what every later operation is refused
// with, in the same line. "" while there is none.
std::string failure();
void refuse_after_failure();
[[noreturn]] void lose_device(const std::string& line);

[[noreturn]] void fail_cuda(cudaError_t status, const char* what);

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail_cuda(status, what);
}

// Device memory; running out is one line that says how much was needed, for what, and was free.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(std::size_t bytes, const char* purpose);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }

 private:
  void swap(DeviceMemory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Host memory that the device reads and writes by itself.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(std::size_t bytes);
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept { swap(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void swap(PinnedMemory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// A place in a stream.
class Event {
 public:
  explicit Event(unsigned flags = cudaEventDefault) {
    check(cudaEventCreateWithFlags(&event_, flags), "making an event");
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "recording an event"); }
  void wait() const { check(cudaEventSynchronize(event_), "waiting for an event"); }
  // On the device between two places, once both have passed.
  friend double microseconds(const Event& begin, const Event& end) {
    end.wait();
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin.event_, end.event_), "measuring");
    return 1e3 * static_cast<double>(milliseconds);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Kernels beyond the 48 KiB of shared memory that every device gives must ask for it.
template <typename Args>
void launch(void (*kernel)(Args), const Grid& grid, const Args& args, cudaStream_t stream,
            bool overlap) {
  if (grid.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               grid.shared_bytes),
          "asking for shared memory");
  }
  // A multiprocessor divides its memory into L1 and shared memory anew where nothing runs on it: so
  // kernels that overlap all ask for one division, that of those with the most shared memory.
  if (overlap) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "asking for shared memory");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                        static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), "launching a kernel");
}

}  // namespace sbd::cuda
