#include "backend/cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/random.h"

namespace sbd::cpu {

namespace {

// -log(-log(u)) of the largest u that uniform() returns, 1 - 2^-24, rounded up.
constexpr float kHighestGumbel = 16.7f;

struct Candidates {
  std::span<TokenId> ids;
  float mass;  // sum of exp((logit - highest) / temperature)
};

// Most probable first; equal logits: the lower id first.
struct LessProbable {
  const float* logits;
  bool operator()(TokenId a, TokenId b) const {
    return logits[a] < logits[b] || (logits[a] == logits[b] && a > b);
  }
};

Candidates most_probable(std::span<const float> logits, const Sampling& sampling, float mass,
                         float inverse_temperature, float highest, std::span<TokenId> ids) {
  const auto weight = [&](TokenId id) {
    return std::exp((logits[id] - highest) * inverse_temperature);
  };
  std::iota(ids.begin(), ids.end(), 0);
  const LessProbable less{logits.data()};
  if (sampling.top_k > 0 && static_cast<std::size_t>(sampling.top_k) < ids.size()) {
    std::nth_element(ids.begin(), ids.begin() + sampling.top_k, ids.end(),
                     [&](TokenId a, TokenId b) { return less(b, a); });
    ids = ids.first(static_cast<std::size_t>(sampling.top_k));
    // In one order whatever nth_element did, so that the sum below has one value.
    std::sort(ids.begin(), ids.end());
    mass = std::accumulate(ids.begin(), ids.end(), 0.0f,
                           [&](float sum, TokenId id) { return sum + weight(id); });
  }
  if (sampling.top_p >= 1.0f) return {ids, mass};

  // A heap gives the few most probable ones without sorting the vocabulary; each pop moves one
  // behind the heap's end.
  std::make_heap(ids.begin(), ids.end(), less);
  auto end = ids.end();
  float kept_mass = 0;
  do {
    std::pop_heap(ids.begin(), end, less);
    kept_mass += weight(*--end);
  } while (end != ids.begin() && kept_mass < sampling.top_p * mass);
  return {{end, ids.end()}, kept_mass};
}

Candidates filter(std::span<const float> logits, const Sampling& sampling, float mass,
                  float inverse_temperature, float highest, std::span<TokenId> ids) {
  Candidates kept = most_probable(logits, sampling, mass, inverse_temperature, highest, ids);
  if (sampling.min_p <= 0.0f) return kept;
  const auto end = std::partition(kept.ids.begin(), kept.ids.end(), [&](TokenId id) {
    return std::exp((logits[id] - highest) * inverse_temperature) >= sampling.min_p;
  });
  kept.ids = kept.ids.first(static_cast<std::size_t>(end - kept.ids.begin()));
  std::sort(kept.ids.begin(), kept.ids.end());  // the sum has one value
  kept.mass = 0;
  for (const TokenId id : kept.ids) {
    kept.mass += std::exp((logits[id] - highest) * inverse_temperature);
  }
  return kept;
}

}  // namespace

Sample sample(const Kernels& kernels, std::span<const float> logits, const Sampling& sampling,
              int position, std::span<TokenId> scratch) {
  std::uint64_t key = combine(sampling.seed, sampling.sample_index);
  key = combine(key, static_cast<std::uint64_t>(position));
  key = combine(key, sampling.draw);

  // Bounded, so that at the smallest temperatures 0 times it is 0, and at the highest an excluded
  // token stays excluded.
  const float inverse_temperature = std::clamp(1.0f / sampling.temperature, 1e-20f, 1e30f);
  const float highest = *std::max_element(logits.begin(), logits.end());
  const float mass = kernels.exp_sum(logits.data(), static_cast<Index>(logits.size()), highest,
                                     inverse_temperature);

  Sample best{-1, 0};
  float best_score = kMinusInfinity;
  float kept_mass = mass;
  const auto consider = [&](TokenId id) {
    const float scaled = (logits[id] - highest) * inverse_temperature;
    if (scaled + kHighestGumbel < best_score) return;  // cannot win: most of the vocabulary
    const float u = uniform(key, static_cast<std::uint64_t>(id));
    const float score = scaled - std::log(-std::log(u));
    if (score > best_score) {
      best_score = score;
      best = {id, scaled};
    }
  };
  if (sampling.top_k > 0 || sampling.top_p < 1.0f || sampling.min_p > 0.0f) {
    const Candidates kept = filter(logits, sampling, mass, inverse_temperature, highest, scratch);
    kept_mass = kept.mass;
    for (const TokenId id : kept.ids) consider(id);
  } else {
    for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) consider(id);
  }
  best.probability = std::exp(best.probability) / kept_mass;
  return best;
}

}  // namespace sbd::cpu
