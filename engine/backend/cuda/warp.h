// Sums and maxima over the threads of a warp or a block, always in one order.
#pragma once

#include "backend/cuda/ptx.h"

namespace sbd::cuda {

template <typename T>
__device__ T warp_sum(T x) {
  return warp_reduce(x, [](T a, T b) { return a + b; });
}

__device__ inline float warp_max(float x) {
  return warp_reduce(x, [](float a, float b) { return fmaxf(a, b); });
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
