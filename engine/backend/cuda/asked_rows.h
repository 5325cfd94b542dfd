// What a warp does with a run of consecutive logits for what is asked of its row (AskedRow).
#pragma once

#include "backend/cuda/head.h"
#include "backend/cuda/run_stats.h"
#include "backend/cuda/units.h"

namespace sbd::cuda {

// Of the adjustments of a row, the first of a token that is not below this one.
__device__ inline int first_adjustment(const AskedRow& ask, TokenId token) {
  int begin = 0, end = ask.n_adjustments;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (ask.adjustments[middle].token < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ inline float adjusted(const Adjustment& one, float logit) {
  logit += one.bias;
  logit = (logit > 0 ? logit / one.factor : logit * one.factor) - one.penalty;
  return logit < kExcluded ? kExcluded : logit;  // NaN stays
}

// The best tokens of a run, the most probable first; behind the last one, none (kNoTop).
__device__ inline void best_of_run(const float* logits, int first_id, int n, TokenScore* best,
                                   int n_best) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Top last{INFINITY, INFINITY, -1};
  for (int i = 0; i < n_best; ++i) {
    Top next = kNoTop;
    for (int at = lane; at < n; at += kWarp) {
      const Top one{logits[at], kExcluded, first_id + at};
      if (is_behind(one, last)) next = better(next, one);
    }
    last = warp_top(next);
    if (lane == 0) best[i] = {last.argmax, last.max};
  }
}

// A run's logits as the model says, of n tokens from first_id on: what is scored of them; then they
// are put under the row's rules. Out of line, as below, so that matmuls without asks keep their
// registers.
__device__ __noinline__ inline void ask_run(const AskedRow& ask, float* logits, int first_id, int n,
                                            int run) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (ask.score != nullptr) {
    const RunStats own = run_stats<kBlockFeatures>(logits, first_id, first_id + n, /*mask=*/-1);
    if (lane == 0) ask.runs[run] = own;
    best_of_run(logits, first_id, n, ask.run_best + Index{run} * ask.n_run_best, ask.n_run_best);
    const int given = ask.given - first_id;
    if (lane == 0 && given >= 0 && given < n) *ask.score = {{ask.given, logits[given]}, 0};
    __syncwarp();
  }
  for (int i = first_adjustment(ask, first_id) + lane; i < ask.n_adjustments; i += kWarp) {
    const Adjustment one = ask.adjustments[i];
    if (one.token >= first_id + n) break;
    float& logit = logits[one.token - first_id];
    if (ask.unadjusted != nullptr) ask.unadjusted[i] = logit;
    logit = adjusted(one, logit);
  }
  __syncwarp();
  if (ask.allowed == nullptr) return;
  for (int at = lane; at < n; at += kWarp) {
    if ((ask.allowed[(first_id + at) / 32] >> lane & 1u) == 0) logits[at] = kExcluded;
  }
  __syncwarp();
}

// Adds a run's tokens that are more probable than the given one, whose logit is known by now.
__device__ __noinline__ inline void count_before(const AskedRow& ask, const float* logits,
                                                 int first_id, int n) {
  if (ask.given < 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Top given{ask.score->token.logprob, kExcluded, ask.given};
  int before = 0;
  for (int at = lane; at < n; at += kWarp) {
    before += is_behind(given, {logits[at], kExcluded, first_id + at}) ? 1 : 0;
  }
  before = warp_sum(before);
  if (lane == 0 && before > 0) atomicAdd(&ask.score->rank, before);
}

}  // namespace sbd::cuda
