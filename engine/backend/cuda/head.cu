#include "backend/cuda/head.h"

#include "backend/cuda/run_stats.h"
#include "backend/cuda/units.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;  // a vocabulary of 150,000 is 1172 runs

__device__ double warp_sum(double x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

struct Shared {  // of each warp
  Top tops[kThreads / kWarp];
  double sums[kThreads / kWarp], weighted[kThreads / kWarp];
  int not_finite[kThreads / kWarp];
};

// A block: a row. With m the highest logit, s = sum of exp(l - m) and w = sum of (l - m) exp(l -
// m), the entropy is log(s) - w / s.
__global__ void __launch_bounds__(kThreads) merge_kernel(HeadArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Index row = blockIdx.x;
  const RunStats* runs = a.runs + row * a.n_runs;
  Top top = kNoTop;
  float not_finite = 0;
  for (int i = static_cast<int>(threadIdx.x); i < a.n_runs; i += kThreads) {
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
  for (int i = static_cast<int>(threadIdx.x); i < a.n_runs; i += kThreads) {
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
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / kWarp; ++i) {
    sum += shared.sums[i];
    weighted += shared.weighted[i];
  }
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

}  // namespace

void head_stats(Tape& tape, const HeadArgs& args, int n_rows) {
  tape.add({"head statistics"}, merge_kernel,
           {.x = n_rows, .threads = kThreads, .shared_bytes = static_cast<int>(sizeof(Shared))},
           args);
}

}  // namespace sbd::cuda
