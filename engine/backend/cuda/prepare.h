// What a matmul reads, made of what the layer before wrote: RMSNorm or SwiGLU, then the type and
// the rows that the product wants.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/tape.h"

namespace sbd::cuda {

struct PrepareArgs {
  const float* x;
  const float* up;           // or null
  const float* norm_weight;  // or null
  const int* source_rows;    // [rows] of x, or null: in order
  float* values;             // [rows, cols], or null
  std::uint16_t* bf16;  // [rows, padded cols], zeros behind cols, a step in its own order; or null
  std::uint16_t* halves;  // likewise, of a row divided by its half_scale, or null
  float* half_scale;      // [rows]
  float* step_sums;       // [rows, padded cols / 32] of the halves, or null
  float eps;
  int cols;
  int padded_cols;
  bool operator==(const PrepareArgs&) const = default;
};
void prepare(Tape& tape, const PrepareArgs& args, int n_rows);

struct MixArgs {
  const Mix* mixes;  // [rows]
  const float* x;
  const float* y;
  float* out;  // [rows, cols]
  int cols;
  float scale = 1;  // of the sum
  bool operator==(const MixArgs&) const = default;
};
void mix(Tape& tape, const MixArgs& args, int n_rows);

}  // namespace sbd::cuda
