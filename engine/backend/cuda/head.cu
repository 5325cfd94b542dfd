#include "backend/cuda/head.h"

#include "backend/cuda/units.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kThreadLogits = 16;
constexpr int kRun = kThreads * kThreadLogits;  // tokens

struct Top {
  float max;
  float second;
  int argmax;
};

// Chooses values, not structs, which would go through local memory.
__device__ Top better(const Top& a, const Top& b) {
  const bool b_wins = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
  const float loser = b_wins ? a.max : b.max;
  return {b_wins ? b.max : a.max, fmaxf(b_wins ? b.second : a.second, loser),
          b_wins ? b.argmax : a.argmax};
}

__device__ Top block_top(Top top, float* scratch) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    top = better(top, {__shfl_xor_sync(kAllLanes, top.max, step),
                       __shfl_xor_sync(kAllLanes, top.second, step),
                       __shfl_xor_sync(kAllLanes, top.argmax, step)});
  }
  auto* tops = reinterpret_cast<Top*>(scratch);
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = top;
  __syncthreads();
  Top all = tops[0];
  for (int i = 1; i < kThreads / kWarp; ++i) all = better(all, tops[i]);
  __syncthreads();
  return all;
}

// A block: a run of one row's logits, which stay in registers.
__global__ void __launch_bounds__(kThreads) run_stats_kernel(HeadArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const Index row = blockIdx.y;
  const int first = static_cast<int>(blockIdx.x) * kRun;
  float logits[kThreadLogits];
  Top top{kExcluded, kExcluded, 0x7fffffff};
  float not_finite = 0;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    const int id = first + i * kThreads + static_cast<int>(threadIdx.x);
    const bool counts = id < a.vocab && id != a.mask_token;
    logits[i] = counts ? a.logits[row * a.vocab + id] : kExcluded;
    if (!isfinite(logits[i])) not_finite = 1;
    if (counts) top = better(top, {logits[i], kExcluded, id});
  }
  top = block_top(top, scratch);
  float sum = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < kThreadLogits; ++i) {
    const float below = logits[i] - top.max;
    const float e = expf(below);
    sum += e;
    weighted += below * e;
  }
  sum = block_sum(sum, scratch);
  weighted = block_sum(weighted, scratch);
  not_finite = block_max(not_finite, scratch);
  if (threadIdx.x == 0) {
    a.runs[row * gridDim.x + blockIdx.x] = {top.max,  top.second, sum,
                                            weighted, top.argmax, not_finite > 0};
  }
}

__device__ double warp_sum(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// A warp: a row. With m the highest logit, s = sum of exp(l - m) and w = sum of (l - m) exp(l - m),
// the entropy is log(s) - w / s.
__device__ void merge_runs(const HeadArgs& a, int n_runs) {
  const Index row = blockIdx.x;
  const RunStats* runs = a.runs + row * n_runs;
  Top top{kExcluded, kExcluded, 0x7fffffff};
  bool finite = true;
  for (int i = 0; i < n_runs; ++i) {
    top = better(top, {runs[i].max, runs[i].second, runs[i].argmax});
    finite = finite && runs[i].not_finite == 0;
  }
  double sum = 0, weighted = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n_runs; i += kWarp) {
    const double below = static_cast<double>(runs[i].max) - top.max;
    const double factor = exp(below);
    sum += factor * runs[i].sum;
    weighted += factor * (runs[i].weighted_sum + below * runs[i].sum);
  }
  sum = warp_sum(sum);
  weighted = warp_sum(weighted);
  if (threadIdx.x != 0) return;
  const double entropy = log(sum) - weighted / sum;
  RowStats stats;
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

struct MergeArgs {
  HeadArgs head;
  int n_runs;
  bool operator==(const MergeArgs&) const = default;
};

__global__ void merge_kernel(MergeArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  merge_runs(a.head, a.n_runs);
}

}  // namespace

int head_runs(int vocab) { return ceil_div(vocab, kRun); }

void head_stats(Tape& tape, const HeadArgs& args, int n_rows, bool sampled) {
  const int n_runs = head_runs(args.vocab);
  tape.add(run_stats_kernel,
           {.x = n_runs,
            .y = n_rows,
            .threads = kThreads,
            .shared_bytes = kThreads / kWarp * static_cast<int>(sizeof(Top))},
           args);
  tape.add(merge_kernel, {.x = n_rows, .threads = kWarp}, MergeArgs{args, n_runs});
  if (sampled) sample(tape, args, n_rows);
}

}  // namespace sbd::cuda
