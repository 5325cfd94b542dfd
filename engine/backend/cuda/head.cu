#include "backend/cuda/head.h"

#include "backend/cuda/asked_rows.h"
#include "backend/cuda/run_stats.h"
#include "backend/cuda/units.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;  // a vocabulary of 150,000 is 1172 runs

struct Shared {  // of each warp
  Top tops[kThreads / kWarp];
  double sums[kThreads / kWarp], weighted[kThreads / kWarp];
  int not_finite[kThreads / kWarp];
};

// With m the highest logit: sum of exp(l - m), and of (l - m) exp(l - m).
struct Merged {
  Top top;
  double sum, weighted;
  bool finite;
};

// By a block, of all runs.
__device__ Merged merge(const RunStats* runs, int n_runs, Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Top top = kNoTop;
  float not_finite = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n_runs; i += kThreads) {
    top = better(top, runs[i].top);
    if (runs[i].not_finite != 0) not_finite = 1;
  }
  top = warp_top(top);
  not_finite = warp_max(not_finite);
  if (threadIdx.x % kWarp == 0) {
    shared.tops[warp] = top;
    shared.not_finite[warp] = not_finite > 0;
  }
  __syncthreads();
  top = shared.tops[0];
  bool finite = shared.not_finite[0] == 0;
  for (int i = 1; i < kThreads / kWarp; ++i) {
    top = better(top, shared.tops[i]);
    finite = finite && shared.not_finite[i] == 0;
  }
  double sum = 0, weighted = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n_runs; i += kThreads) {
    const double below = static_cast<double>(runs[i].top.max) - top.max;
    const double factor = exp(below);
    sum += factor * runs[i].sum;
    weighted += factor * (runs[i].weighted_sum + below * runs[i].sum);
  }
  sum = warp_sum(sum);
  weighted = warp_sum(weighted);
  if (threadIdx.x % kWarp == 0) {
    shared.sums[warp] = sum;
    shared.weighted[warp] = weighted;
  }
  __syncthreads();
  sum = shared.sums[0], weighted = shared.weighted[0];
  for (int i = 1; i < kThreads / kWarp; ++i) {
    sum += shared.sums[i];
    weighted += shared.weighted[i];
  }
  return {top, sum, weighted, finite};
}

// A block: a row. The entropy is log(s) - w / s with s and w the two sums.
__global__ void __launch_bounds__(kThreads) merge_kernel(HeadArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Index row = blockIdx.x;
  const auto [top, sum, weighted, finite] = merge(a.runs + row * a.n_runs, a.n_runs, shared);
  if (threadIdx.x != 0) return;
  const double entropy = log(sum) - weighted / sum;
  RowNumbers stats;
  stats.argmax = top.argmax;
  stats.top_probability = static_cast<float>(1.0 / sum);
  stats.margin = static_cast<float>((1.0 - exp(static_cast<double>(top.second) - top.max)) / sum);
  stats.log_z = static_cast<float>(top.max + log(sum));
  stats.entropy = static_cast<float>(entropy < 0 ? 0.0 : entropy);
  if (!finite || !(top.max > kExcluded)) stats.entropy = NAN;
  stats.sampled = stats.argmax;
  stats.sampled_probability = stats.top_probability;
  a.stats[row] = stats;
  a.highest[row] = top.max;
}

// The logit of the token that a row decided, without its rules.
__device__ float own_logit(const HeadArgs& a, const AskedRow& ask, Index row, TokenId token) {
  const int i = first_adjustment(ask, token);
  if (i < ask.n_adjustments && ask.adjustments[i].token == token) return ask.unadjusted[i];
  return token == a.stats[row].argmax ? a.highest[row] : a.logits[row * a.vocab + token];
}

// A block: a row. The best tokens come one after the other, each from the run whose first one
// behind the last is the most probable.
__global__ void __launch_bounds__(kThreads) score_kernel(HeadArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Index row = blockIdx.x;
  const AskedRow& ask = a.asks[row];
  if (ask.score == nullptr || isnan(a.stats[row].entropy)) return;
  const Merged all = merge(ask.runs, a.n_runs, shared);
  const auto log_z = static_cast<float>(all.top.max + log(all.sum));
  if (threadIdx.x == 0) {
    if (!all.finite) a.stats[row].entropy = NAN;
    if (ask.given < 0) {
      const TokenId token = a.stats[row].sampled;
      ask.score->token = {token, own_logit(a, ask, row, token)};
      ask.score->rank = -1;
    }
    ask.score->token.logprob -= log_z;
  }
  Top last{INFINITY, INFINITY, -1};
  for (int n = 0; n < ask.n_best; ++n) {
    Top next = kNoTop;
    for (int run = static_cast<int>(threadIdx.x); run < a.n_runs; run += kThreads) {
      const TokenScore* best = ask.run_best + Index{run} * ask.n_run_best;
      for (int i = 0; i < ask.n_run_best; ++i) {
        const Top one{best[i].logprob, kExcluded, best[i].token};
        if (!is_behind(one, last)) continue;
        next = better(next, one);
        break;
      }
    }
    next = warp_top(next);
    if (threadIdx.x % kWarp == 0) shared.tops[threadIdx.x / kWarp] = next;
    __syncthreads();
    last = shared.tops[0];
    for (int i = 1; i < kThreads / kWarp; ++i) last = better(last, shared.tops[i]);
    __syncthreads();
    if (threadIdx.x == 0) ask.best[n] = {last.argmax, last.max - log_z};
  }
}

}  // namespace

void head_stats(Tape& tape, const HeadArgs& args, int n_rows) {
  tape.add({"head statistics"}, merge_kernel,
           {.x = n_rows, .threads = kThreads, .shared_bytes = static_cast<int>(sizeof(Shared))},
           args);
}

void head_scores(Tape& tape, const HeadArgs& args, int n_rows) {
  tape.add({"scores"}, score_kernel,
           {.x = n_rows, .threads = kThreads, .shared_bytes = static_cast<int>(sizeof(Shared))},
           args);
}

}  // namespace sbd::cuda
