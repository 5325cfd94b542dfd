// Sums and maxima over the threads of a warp or a block, always in one order.
#pragma once

#include "backend/cuda/ptx.h"

namespace sbd::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kWarp = 32;

template <typename T>
__device__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// `scratch`: one value for each warp, free for the next use after this returns.
template <typename T, typename Combine>
__device__ T block_reduce(T x, T* scratch, T start, Combine combine) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[warp] = x;
  __syncthreads();
  T all = start;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) all = combine(all, scratch[i]);
  __syncthreads();
  return all;
}

__device__ inline float block_sum(float x, float* scratch) {
  return block_reduce(warp_sum(x), scratch, 0.0f, [](float a, float b) { return a + b; });
}

__device__ inline float block_max(float x, float* scratch) {
  return block_reduce(warp_max(x), scratch, 0.0f, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace sbd::cuda
