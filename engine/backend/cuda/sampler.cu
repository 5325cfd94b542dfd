// Draws as the CPU does: temperature, then top-k, then top-p, then Gumbel-max over the tokens kept,
// u from a counter keyed by (seed, sample index, position, draw, token id).
//
// The cuts are found without sorting: a token's rank is one integer, its logit's bits in order and
// below them its id, the lower the higher; eight rounds of a histogram find the last one kept.
// Probabilities are counted in units of 2^-40, so that their sum has one value in any order.
#include "backend/cuda/head.h"

#include "backend/cuda/units.h"
#include "backend/cuda/warp.h"
#include "core/random.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kBins = 256;
constexpr float kMassUnit = 0x1p40f;

using Rank = std::uint64_t;
using Mass = unsigned long long;  // what atomicAdd takes

struct Shared {
  Mass bins[kBins];
  Mass remaining;
  Mass total;
  Rank cut;
  float scores[kThreads / kWarp];
  int ids[kThreads / kWarp];
};

struct Row {
  const float* logits;
  int vocab, mask_token;
  float highest, inverse_temperature;

  __device__ Rank rank(int id) const {
    const unsigned bits = __float_as_uint(logits[id] + 0.0f);  // -0 becomes 0
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Rank>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(id));
  }
  __device__ float scaled(int id) const { return (logits[id] - highest) * inverse_temperature; }
  __device__ Mass mass(int id) const { return static_cast<Mass>(expf(scaled(id)) * kMassUnit); }

  // Calls f(id) for this thread's share of the tokens of at least the rank.
  template <typename F>
  __device__ void for_each(Rank lowest, F f) const {
    for (int id = threadIdx.x; id < vocab; id += kThreads) {
      if (id != mask_token && rank(id) >= lowest) f(id);
    }
  }
};

__device__ Mass total_mass(const Row& row, Rank lowest, Shared& shared) {
  if (threadIdx.x == 0) shared.total = 0;
  __syncthreads();
  Mass mine = 0;
  row.for_each(lowest, [&](int id) { mine += row.mass(id); });
  atomicAdd(&shared.total, mine);
  __syncthreads();
  const Mass total = shared.total;
  __syncthreads();
  return total;
}

// The rank at which the tokens of rank `lowest` and more, highest first, reach `target` in the sum
// of weight(id).
template <typename Weight>
__device__ Rank cut(const Row& row, Rank lowest, Mass target, Shared& shared, Weight weight) {
  if (threadIdx.x == 0) {
    shared.remaining = target;
    shared.cut = 0;
  }
  __syncthreads();
  Rank known = 0;  // bits of the rank that have been found
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
    const Rank found = shared.cut;
    __syncthreads();
    row.for_each(lowest, [&](int id) {
      const Rank rank = row.rank(id);
      if ((rank & known) == found) atomicAdd(&shared.bins[rank >> shift & 255u], weight(id));
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      int lowest_filled = 0, bin = kBins - 1;
      for (; bin >= 0; --bin) {
        if (shared.bins[bin] == 0) continue;
        lowest_filled = bin;
        if (shared.bins[bin] >= shared.remaining) break;
        shared.remaining -= shared.bins[bin];
      }
      shared.cut = found | static_cast<Rank>(bin < 0 ? lowest_filled : bin) << shift;
    }
    known |= static_cast<Rank>(255) << shift;
    __syncthreads();
  }
  const Rank result = shared.cut;
  __syncthreads();
  return result;
}

// The higher score; of equal ones the lower id.
__device__ bool beats(float score, int id, float other_score, int other_id) {
  return score > other_score || (score == other_score && id < other_id);
}

__global__ void __launch_bounds__(kThreads) sample_kernel(HeadArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const Index at = blockIdx.x;
  const HeadRow& output = a.rows[at];
  const Sampling& sampling = output.sampling;
  if (!(sampling.temperature > 0) || isnan(a.stats[at].entropy)) return;
  // Bounded as on the CPU: at the lowest temperatures 0 times it is 0.
  const float inverse = fminf(fmaxf(1.0f / sampling.temperature, 1e-20f), 1e30f);
  const Row row{a.logits + at * a.vocab, a.vocab, a.mask_token, a.highest[at], inverse};

  Rank lowest = 0;
  if (sampling.top_k > 0 && sampling.top_k < a.vocab) {
    lowest =
        cut(row, lowest, static_cast<Mass>(sampling.top_k), shared, [](int) { return Mass{1}; });
  }
  Mass mass = total_mass(row, lowest, shared);
  if (sampling.top_p < 1.0f) {
    const auto target =
        static_cast<Mass>(static_cast<double>(sampling.top_p) * static_cast<double>(mass));
    lowest =
        cut(row, lowest, target > 0 ? target : 1, shared, [&](int id) { return row.mass(id); });
    mass = total_mass(row, lowest, shared);
  }

  std::uint64_t key = combine(sampling.seed, sampling.sample_index);
  key = combine(key, static_cast<std::uint64_t>(output.position));
  key = combine(key, sampling.draw);
  float best = -INFINITY;
  int best_id = 0x7fffffff;
  row.for_each(lowest, [&](int id) {
    const float score = row.scaled(id) - logf(-logf(uniform(key, static_cast<std::uint64_t>(id))));
    if (beats(score, id, best, best_id)) best = score, best_id = id;
  });
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float score = __shfl_xor_sync(kAllLanes, best, step);
    const int id = __shfl_xor_sync(kAllLanes, best_id, step);
    if (beats(score, id, best, best_id)) best = score, best_id = id;
  }
  if (threadIdx.x % kWarp == 0) {
    shared.scores[threadIdx.x / kWarp] = best;
    shared.ids[threadIdx.x / kWarp] = best_id;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / kWarp; ++i) {
    if (beats(shared.scores[i], shared.ids[i], best, best_id)) {
      best = shared.scores[i], best_id = shared.ids[i];
    }
  }
  a.stats[at].sampled = best_id;
  a.stats[at].sampled_probability =
      expf(row.scaled(best_id)) / (static_cast<float>(mass) / kMassUnit);
}

}  // namespace

void sample(Tape& tape, const HeadArgs& args, int n_rows) {
  tape.add(sample_kernel,
           {.x = n_rows, .threads = kThreads, .shared_bytes = static_cast<int>(sizeof(Shared))},
           args);
}

}  // namespace sbd::cuda
