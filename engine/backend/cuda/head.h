// Behind the LM head: the statistics of runs of logits, which its matmul leaves (linear_tile.h), to
// those of rows; and tokens drawn.
#pragma once

#include <cstdint>

#include "backend/cuda/tape.h"
#include "core/batch.h"

namespace sbd::cuda {

struct AskedRow;  // asked_rows.h
struct RowScore;  // asked_rows.h
struct RunStats;  // run_stats.h

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
