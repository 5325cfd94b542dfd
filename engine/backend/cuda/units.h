// Sizes that host and device agree on.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace sbd::cuda {

using Index = std::ptrdiff_t;  // offsets are computed in it: products of int counts overflow an int

inline constexpr int kBlockFeatures = 128;  // output features of a thread block's matmul
inline constexpr int kChunk = 64;           // inputs of a stage
inline constexpr int kStepInputs = 32;      // of a tile

// Where in its step an input lies, for both operands of a product (formats.h).
__host__ __device__ constexpr int place_in_step(int k) {
  return k % 16 / 4 * 8 + k % kStepInputs / 16 * 4 + k % 4;
}

__host__ __device__ constexpr int ceil_div(int n, int unit) { return (n + unit - 1) / unit; }

}  // namespace sbd::cuda
