// Sizes that host and device agree on.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace sbd::cuda {

using Index = std::ptrdiff_t;  // offsets are computed in it: products of int counts overflow an int

inline constexpr int kBlockFeatures = 128;  // output features of a thread block's matmul
inline constexpr int kChunk = 64;           // inputs of a stage

__host__ __device__ constexpr int ceil_div(int n, int unit) { return (n + unit - 1) / unit; }

}  // namespace sbd::cuda
