// CudaBackend: weights of random numbers, made where they stay.
#include "backend/cuda/cuda_backend.h"
#include "core/random_weight.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;

struct RandomArgs {
  std::uint8_t* out;
  DType dtype;
  std::uint64_t key;
  Index n_blocks;
};

__global__ void random_kernel(RandomArgs a) {  // a thread: a block of the format
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.n_blocks) return;
  random_block(a.dtype, a.key, static_cast<std::uint64_t>(i),
               a.out + i * static_cast<Index>(bytes_per_block(a.dtype)));
}

}  // namespace

std::unique_ptr<Weight> CudaBackend::random_weight(DType dtype, int rows, int cols,
                                                   std::uint64_t key) {
  use_device();
  const Index n_blocks = Index{rows} * cols / values_per_block(dtype);
  const std::size_t bytes = static_cast<std::size_t>(n_blocks) * bytes_per_block(dtype);
  const DeviceMemory file(bytes, "random weights");
  launch(random_kernel,
         {.x = static_cast<int>((n_blocks + kThreads - 1) / kThreads), .threads = kThreads},
         RandomArgs{file.as<std::uint8_t>(), dtype, key, n_blocks}, stream_, false);
  return pack(Tensor{"random weights", dtype, {rows, cols}, {file.as<std::byte>(), bytes}});
}

}  // namespace sbd::cuda
