// Matmuls: out [rows, features] (+)= x [rows, cols] weight^T + bias. Two families of kernels: of
// few rows (linear.cu) and of many (prefill.cu).
#pragma once

#include "backend/cuda/packed_weight.h"
#include "backend/cuda/tape.h"

namespace sbd::cuda {

struct AskedRow;  // head.h
struct RunStats;  // head.h

inline constexpr int kMaxParts = 3;  // weights on one input that share a launch

struct LinearPart {
  const std::uint8_t* weight;
  const float* bias;  // or null
  float* out;         // [rows, features]; null where only their statistics are wanted
  int features;
  int first_block;
  bool operator==(const LinearPart&) const = default;
};

// Of an LM head: statistics of every block of 128 logits.
struct HeadRuns {
  RunStats* runs;        // [rows][blocks]; null of any other weight
  const AskedRow* asks;  // [rows]; null: nothing is asked beyond statistics
  int mask_token;        // -1: none
  int ranks;             // once more, for the ranks of given tokens alone
  bool operator==(const HeadRuns&) const = default;
};

struct LinearArgs {
  LinearPart parts[kMaxParts];
  const void* x;           // [rows, padded cols] of halves or bf16, or [rows, cols] of floats
  const float* row_scale;  // [rows], or null: 1
  const float* step_sums;  // [rows, padded cols / 32], of x; where weights have minima
  HeadRuns head;
  float* partials;     // [row tiles][blocks][splits][128 features][rows of a tile]
  unsigned* counters;  // [row tiles][blocks], 0 between two kernels
  int n_parts;
  int n_rows;
  int cols;
  int n_chunks;
  int n_splits;
  int n_blocks;  // of all parts
  int accumulate;
  int prefetch;     // stages of weights that are asked into L2 before the kernel before has ended
  int evict_first;  // L2 drops weights first
  bool operator==(const LinearArgs&) const = default;
};

// What a launch is fitted to.
struct DeviceShape {
  int n_multiprocessors;
  int multiprocessor_shared_bytes;
  int block_shared_bytes;
};

// Adds the launch for weights of one type and cols, which all args but the scratch describe.
void linear(Tape& tape, DType dtype, const LinearArgs& args);

// What a launch needs of them.
struct LinearScratch {
  std::size_t partial_floats;
  std::size_t counters;
};
LinearScratch linear_scratch(const LinearArgs& args);

// Parts of the inner dimension that blocks of their own take, to come near so many blocks. It
// depends on the weights and on the device alone: so a row's result does not depend on the rows
// beside it.
int choose_splits(int n_blocks, int n_chunks, int wanted_blocks);

// For profiles: the weights, stored as their type is.
Work matmul_work(DType dtype, const LinearArgs& args);

// Whether many rows are worth the second family (not in float32), and its launch.
bool prefill_pays(DType dtype, const LinearArgs& args, const DeviceShape& device);
void prefill(Tape& tape, DType dtype, const LinearArgs& args, const DeviceShape& device);

}  // namespace sbd::cuda
