// A CUDA backend for tests: the machine's GPU, or the emulated one.
#pragma once

#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "check.h"
#include "reference.h"

namespace sbd::cuda {

inline constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16, DType::q8_0, DType::q4_0};
inline constexpr DType kCacheTypes[] = {DType::f32, DType::f16, DType::bf16};

// n rows that are nothing in particular.
inline void begin_rows(Backend& backend, int n) {
  const std::vector<int> numbers(static_cast<std::size_t>(n));
  backend.begin({numbers, numbers, numbers, {}}, {}, false);
}

// Features that make a forward of `rows` > 64 rows worth the kernels for many (linear.h), with some
// left over.
inline int many_features(int rows) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "asking for its properties");
  const int blocks = ceil_div(properties.multiProcessorCount, 2 * ceil_div(rows, 128));
  return blocks * kBlockFeatures - 57;
}

}  // namespace sbd::cuda
