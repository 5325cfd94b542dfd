// Behind the LM head: each row's logits to its statistics and its token.
#pragma once

#include <cstdint>

#include "backend/cuda/tape.h"
#include "model/batch.h"

namespace sbd::cuda {

inline constexpr float kExcluded = -1e30f;  // the logit of a token that cannot be: finite

// Softmax statistics of a run of logits.
struct RunStats {
  float max;
  float second;        // the next highest logit, equal to max where two share it
  float sum;           // of exp(l - max)
  float weighted_sum;  // of (l - max) exp(l - max)
  int argmax;          // lowest id
  int not_finite;      // is any logit?
};

struct HeadRow {
  int position;
  Sampling sampling;
};

struct HeadArgs {
  const float* logits;  // [rows, vocab]
  const HeadRow* rows;
  RunStats* runs;  // [rows][runs]
  float* highest;  // [rows]
  RowStats* stats;
  int vocab;
  int mask_token;  // -1: none
  bool operator==(const HeadArgs&) const = default;
};

// RowStats of each row; an entropy that is NaN says that a logit was not finite. `sampled`: does
// any row have a temperature?
void head_stats(Tape& tape, const HeadArgs& args, int n_rows, bool sampled);
int head_runs(int vocab);

// Tokens drawn at the rows that have a temperature (sampler.cu).
void sample(Tape& tape, const HeadArgs& args, int n_rows);

}  // namespace sbd::cuda
