// Matmuls of a few rows: out [rows, features] (+)= x [rows, cols] weight^T + bias.
#pragma once

#include "backend/cuda/packed_weight.h"
#include "backend/cuda/tape.h"

namespace sbd::cuda {

inline constexpr int kMostParts = 3;  // weights on one input that share a launch

struct LinearPart {
  const std::uint8_t* weight;
  const float* bias;  // or null
  float* out;         // [rows, features]
  int features;
  int first_block;
  bool operator==(const LinearPart&) const = default;
};

struct LinearArgs {
  LinearPart parts[kMostParts];
  const void* x;           // [rows, padded cols] of halves or bf16, or [rows, cols] of floats
  const float* row_scale;  // [rows], or null: 1
  float* partials;         // [row tiles][blocks][splits][128 features][rows of a tile]
  unsigned* counters;      // [row tiles][blocks], 0 between two kernels
  int n_parts;
  int n_rows;
  int cols;
  int n_chunks;
  int n_splits;
  int n_blocks;  // of all parts
  int accumulate;
  bool operator==(const LinearArgs&) const = default;
};

// Adds the launch for weights of one type and cols, which all args but the scratch describe.
void linear(Tape& tape, DType dtype, const LinearArgs& args);

// What a launch needs of them.
struct LinearScratch {
  std::size_t partial_floats;
  std::size_t counters;
};
LinearScratch linear_scratch(const LinearArgs& args);

// Parts of the inner dimension that blocks of their own take. It depends on the weights and on the
// device alone: so a row's result does not depend on the rows beside it.
int choose_splits(int n_blocks, int n_chunks, int n_multiprocessors);

}  // namespace sbd::cuda
