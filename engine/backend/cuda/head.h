// The LM head's rows: what its matmul is asked of them and leaves (linear_tile.h), statistics of
// runs of logits; and what is behind it: those of rows, and tokens drawn.
#pragma once

#include <cstdint>

#include "backend/cuda/tape.h"
#include "core/batch.h"

namespace sbd::cuda {

struct Top {
  float max;
  float second;  // the next highest logit, equal to max where two share it
  int argmax;    // lowest id
};

// Softmax statistics of a run of consecutive logits (run_stats.h).
struct RunStats {
  Top top;
  float sum;           // of exp(l - max)
  float weighted_sum;  // of (l - max) exp(l - max)
  int not_finite;      // is any logit?
};

// Of the given token, else of the one that the row decides: its logit, from the last kernel on its
// log-probability.
struct RowScore {
  TokenScore token;
  int rank;  // of a given token
};

// What is asked of a row beyond its statistics (core/batch.h), in device memory (asked_rows.h).
struct AskedRow {
  const Adjustment* adjustments = nullptr;  // ascending by token
  const std::uint32_t* allowed = nullptr;   // a bit per token; null: all
  RowScore* score = nullptr;                // null: no scores are asked for
  float* unadjusted = nullptr;              // of a scored row: the adjusted tokens' own logits
  RunStats* runs = nullptr;                 // [runs] of the model's own distribution
  TokenScore* run_best = nullptr;           // [runs][n_run_best], by logit
  TokenScore* best = nullptr;               // [n_best]
  int n_adjustments = 0;
  int n_run_best = 0;
  int n_best = 0;
  TokenId given = -1;
};

struct HeadRow {
  int position;
  Sampling sampling;
};

// A row's statistics as a device writes them.
struct RowNumbers {
  TokenId argmax;
  float top_probability;
  float margin;
  float log_z;
  float entropy;
  TokenId sampled;
  float sampled_probability;
};

struct HeadArgs {
  const RunStats* runs;  // [rows][runs]
  const float* logits;   // [rows, vocab], for rows that are sampled
  const HeadRow* rows;
  const AskedRow* asks;  // [rows]; null: nothing is asked beyond statistics
  float* highest;        // [rows]
  RowNumbers* stats;
  int n_runs;
  int vocab;
  int mask_token;  // -1: none
  bool operator==(const HeadArgs&) const = default;
};

// The statistics of each row; an entropy that is NaN says that a logit was not finite.
void head_stats(Tape& tape, const HeadArgs& args, int n_rows);

// Tokens drawn at the rows that have a temperature (sampler.cu).
void sample(Tape& tape, const HeadArgs& args, int n_rows);

// Scores of the rows that ask for them, behind all else.
void head_scores(Tape& tape, const HeadArgs& args, int n_rows);

}  // namespace sbd::cuda
