#include "backend/cuda/runtime.h"

#include <mutex>

namespace sbd::cuda {

namespace {

std::mutex failure_lock;
std::string first_failure;

}  // namespace

std::string failure() {
  const std::scoped_lock lock(failure_lock);
  return first_failure;
}

void refuse_after_failure() {
  const std::string line = failure();
  if (!line.empty()) fail(ErrorKind::device, "{}", line);
}

void lose_device(const std::string& line) {
  {
    const std::scoped_lock lock(failure_lock);
    if (first_failure.empty()) {
      first_failure = line + "; what it held is lost: start the process again";
    }
  }
  fail(ErrorKind::device, "{}", failure());
}

void fail_cuda(cudaError_t status, const char* what) {
  cudaGetLastError();  // an error that does not stick is not met again by the next call
  const std::string line = format("the GPU failed at {}: {}", what, cudaGetErrorString(status));
  if (status == cudaErrorMemoryAllocation) fail(ErrorKind::memory, "{}", line);
  lose_device(line);
}

DeviceMemory::DeviceMemory(std::size_t bytes, const char* purpose) : size_(bytes) {
  const cudaError_t status = cudaMalloc(&data_, bytes > 0 ? bytes : 1);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t available = 0, total = 0;
    check(cudaMemGetInfo(&available, &total), "asking for its free memory");
    constexpr std::size_t kMiB = 1 << 20;
    fail(ErrorKind::memory,
         "the GPU's memory is too small: {} needs {} MiB, {} of {} MiB are free; a lower `n_ctx`, "
         "fewer sequences or smaller weights need less",
         purpose, bytes / kMiB + 1, available / kMiB, total / kMiB);
  }
  check(status, "allocating memory");
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) cudaFree(data_);
}

PinnedMemory::PinnedMemory(std::size_t bytes) : size_(bytes) {
  void* data = nullptr;
  check(cudaMallocHost(&data, bytes), "allocating pinned host memory");
  data_ = static_cast<std::byte*>(data);
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

}  // namespace sbd::cuda
