// A CUDA backend for tests: the machine's GPU, or the emulated one.
#pragma once

#include <algorithm>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "begin_rows.h"
#include "check.h"
#include "reference.h"

namespace sbd::cuda {

// Those whose weights are read as they are; the others become halves.
inline constexpr DType kTypes[] = {DType::f32,  DType::f16,  DType::bf16, DType::q8_0,
                                   DType::q4_0, DType::q4_k, DType::q5_k, DType::q6_k};
inline bool becomes_halves(DType dtype) {
  return std::ranges::find(kTypes, dtype) == std::end(kTypes);
}

// So many columns, or the next whole block's end.
inline int whole_blocks(DType dtype, int cols) {
  const int block = values_per_block(dtype);
  return ceil_div(cols, block) * block;
}

// A GPU's logarithms and exponentials are not the host's in the last bit, so what is drawn may
// differ where two scores are that near: few draws, which are reported. In software they are the
// host's.
#ifdef SBD_CUDA_EMULATED
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif
inline void check_draws(const char* file, int line, int same, int all, double least_share) {
  if (same == all) return;
  const std::string said = format("{} of {} draws are the CPU's", same, all);
  if (kEmulated || same < least_share * all) {
    test::report(file, line, said);
  } else {
    test::remark(file, line, said);
  }
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
