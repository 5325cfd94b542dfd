// Draws as the CPU does: temperature, then top-k, then top-p, then min-p, then Gumbel-max over the
// tokens kept, u from a counter keyed by (seed, sample index, position, draw, token id).
//
// The cuts are found without sorting: a token's rank is one integer, its logit's bits in order and
// below them its id, the lower the higher; six rounds of a histogram find the last one kept.
// Probabilities are counted in units of 2^-38, so that their sum has one value in any order.
#include "backend/cuda/head.h"

#include "backend/cuda/units.h"
#include "backend/cuda/warp.h"
#include "core/random.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAtOnce = 8;  // logits that a thread reads before it uses any
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
static_assert(kBins == 2 * kThreads);
// Shared memory adds 32 bits by itself, but 64 by trial and error, which thousands of threads at a
// few bins would take milliseconds for: so sums are kept in three parts of 13 bits of each summand,
// that as many as 2^19 do not overflow.
constexpr int kParts = 3;
constexpr int kPartBits = 13;
constexpr float kMassUnit = 0x1p38f;
// -log(-log(u)) of the largest u that uniform() returns, 1 - 2^-24, rounded up.
constexpr float kHighestGumbel = 16.7f;

using Rank = std::uint64_t;
using Mass = unsigned long long;

struct Shared {
  unsigned bins[kBins][kParts];
  Mass sums[kWarps];
  Mass remaining;
  Rank cut;
  float scores[kWarps];
  int ids[kWarps];
};

struct Row {
  const float* logits;
  int vocab, mask_token;
  float highest, inverse_temperature;

  __device__ static Rank rank(int id, float logit) {
    const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Rank>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(id));
  }
  __device__ float scaled(float logit) const { return (logit - highest) * inverse_temperature; }
  __device__ Mass mass(float logit) const {
    return static_cast<Mass>(expf(scaled(logit)) * kMassUnit);
  }

  // Calls f(id, logit) for this thread's share of the tokens of at least the rank.
  template <typename F>
  __device__ void for_each(Rank lowest, F f) const {
    for (int first = threadIdx.x; first < vocab; first += kAtOnce * kThreads) {
      float read[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int id = first + i * kThreads;
        read[i] = logits[id < vocab ? id : vocab - 1];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int id = first + i * kThreads;
        if (id < vocab && id != mask_token && rank(id, read[i]) >= lowest) f(id, read[i]);
      }
    }
  }
};

__device__ Mass total_mass(const Row& row, Rank lowest, Shared& shared) {
  Mass mine = 0;
  row.for_each(lowest, [&](int, float logit) { mine += row.mass(logit); });
  return block_reduce(warp_sum(mine), shared.sums, Mass{0}, [](Mass a, Mass b) { return a + b; });
}

// The lowest rank of the tokens of at least rank `lowest` that are at least min_p times as probable
// as the most probable one.
__device__ Rank min_p_cut(const Row& row, Rank lowest, float min_p, Shared& shared) {
  const auto lower = [](Mass a, Mass b) { return a < b ? a : b; };
  Mass mine = ~Mass{0};
  row.for_each(lowest, [&](int id, float logit) {
    if (expf(row.scaled(logit)) >= min_p) mine = lower(mine, Row::rank(id, logit));
  });
  return block_reduce(warp_reduce(mine, lower), shared.sums, ~Mass{0}, lower);
}

__device__ Mass sum_of(const unsigned (&bin)[kParts]) {
  Mass sum = 0;
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) sum = (sum << kPartBits) + bin[part];
  return sum;
}

// The highest digit such that the bins from the last one down to it hold `remaining`. A thread has
// two neighbouring bins, and finds the sum above them.
__device__ void choose_digit(Shared& shared, int shift) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int digit = static_cast<int>(threadIdx.x) * 2;
  const Mass lower = sum_of(shared.bins[digit]), upper = sum_of(shared.bins[digit + 1]);
  Mass from_here = lower + upper;  // to the warp's last lane
  for (int step = 1; step < kWarp; step *= 2) {
    const Mass further = __shfl_sync(kAllLanes, from_here, (lane + step) % kWarp);
    if (lane + step < kWarp) from_here += further;
  }
  if (lane == 0) shared.sums[warp] = from_here;
  __syncthreads();
  Mass above = from_here - lower - upper;
  for (int i = warp + 1; i < kWarps; ++i) above += shared.sums[i];
  const Mass remaining = shared.remaining;
  __syncthreads();
  if (above >= remaining || above + upper + lower < remaining) return;  // but for one thread
  const bool in_upper = above + upper >= remaining;
  shared.remaining = remaining - above - (in_upper ? 0 : upper);
  shared.cut |= static_cast<Rank>(digit + in_upper) << shift;
}

// The rank at which the tokens of rank `lowest` and more, highest first, reach `target` in the sum
// of weight(logit); 0 where they do not.
template <typename Weight>
__device__ Rank cut(const Row& row, Rank lowest, Mass target, Shared& shared, Weight weight) {
  if (threadIdx.x == 0) {
    shared.remaining = target;
    shared.cut = 0;
  }
  Rank known = 0;  // bits of the rank that have been found
  for (int bits = 64; bits > 0;) {
    const int width = bits < kDigitBits ? bits : kDigitBits;
    bits -= width;
    const Rank digits = (Rank{1} << width) - 1;
    unsigned* bins = &shared.bins[0][0];
    for (int i = threadIdx.x; i < kBins * kParts; i += kThreads) bins[i] = 0;
    __syncthreads();
    const Rank found = shared.cut;
    row.for_each(lowest, [&](int id, float logit) {
      const Rank rank = Row::rank(id, logit);
      if ((rank & known) != found) return;
      unsigned* bin = shared.bins[rank >> bits & digits];
      Mass rest = weight(logit);
      for (int part = 0; rest != 0; ++part, rest >>= kPartBits) {
        atomicAdd(bin + part, static_cast<unsigned>(rest & ((1u << kPartBits) - 1)));
      }
    });
    __syncthreads();
    choose_digit(shared, bits);
    __syncthreads();
    known |= digits << bits;
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
        cut(row, lowest, static_cast<Mass>(sampling.top_k), shared, [](float) { return Mass{1}; });
  }
  Mass mass = total_mass(row, lowest, shared);
  if (sampling.top_p < 1.0f) {
    const auto target =
        static_cast<Mass>(static_cast<double>(sampling.top_p) * static_cast<double>(mass));
    lowest = cut(row, lowest, target > 0 ? target : 1, shared,
                 [&](float logit) { return row.mass(logit); });
    mass = total_mass(row, lowest, shared);
  }
  if (sampling.min_p > 0) {
    lowest = min_p_cut(row, lowest, sampling.min_p, shared);
    mass = total_mass(row, lowest, shared);
  }

  std::uint64_t key = combine(sampling.seed, sampling.sample_index);
  key = combine(key, static_cast<std::uint64_t>(output.position));
  key = combine(key, sampling.draw);
  const auto gumbel = [&](int id) {
    return -logf(-logf(uniform(key, static_cast<std::uint64_t>(id))));
  };
  // The most probable token is always kept; few others can beat its score.
  int best_id = a.stats[at].argmax;
  float best = row.scaled(row.logits[best_id]) + gumbel(best_id);
  row.for_each(lowest, [&](int id, float logit) {
    const float scaled = row.scaled(logit);
    if (scaled + kHighestGumbel < best) return;
    const float score = scaled + gumbel(id);
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
  for (int i = 1; i < kWarps; ++i) {
    if (beats(shared.scores[i], shared.ids[i], best, best_id)) {
      best = shared.scores[i], best_id = shared.ids[i];
    }
  }
  a.stats[at].sampled = best_id;
  a.stats[at].sampled_probability =
      expf(row.scaled(row.logits[best_id])) / (static_cast<float>(mass) / kMassUnit);
}

}  // namespace

void sample(Tape& tape, const HeadArgs& args, int n_rows) {
  tape.add({"sample"}, sample_kernel,
           {.x = n_rows, .threads = kThreads, .shared_bytes = static_cast<int>(sizeof(Shared))},
           args);
}

}  // namespace sbd::cuda
