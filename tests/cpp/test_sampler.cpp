// Sampling against the exact distribution: temperature, then top-k, then top-p, then min-p.

#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "check.h"
#include "draw_one.h"
#include "reference.h"

namespace sbd::cpu {
namespace {

using namespace test;

// Pearson's statistic beyond its mean in standard deviations; infinite where a token was drawn that
// cannot be.
double chi_square_excess(const std::vector<int>& counts, const std::vector<double>& p) {
  const double n = std::accumulate(counts.begin(), counts.end(), 0.0);
  double statistic = 0;
  double freedom = -1;
  for (std::size_t i = 0; i < p.size(); ++i) {
    if (p[i] == 0) {
      if (counts[i] > 0) return INFINITY;
      continue;
    }
    statistic += (counts[i] - n * p[i]) * (counts[i] - n * p[i]) / (n * p[i]);
    freedom += 1;
  }
  return freedom == 0 ? 0 : (statistic - freedom) / std::sqrt(2 * freedom);
}

const std::vector<float> kLogits = {1.0f, 0.2f, -0.5f, 2.0f, 2.0f,  kMinusInfinity,
                                    0.9f, 1.5f, -2.0f, 0.2f, -1.0f, 1.4f};

TEST(sampler_draws_from_the_filtered_distribution) {
  const Kernels& kernels = *all_kernels().front();
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    for (const int top_k : {0, 1, 4, 9, 50}) {
      for (const float top_p : {1.0f, 0.95f, 0.6f, 1e-6f}) {
        Sampling sampling{.temperature = temperature,
                          .top_k = top_k,
                          .top_p = top_p,
                          .min_p = top_k % 4 == 0 && top_p > 0.9f ? 0.3f : 0.0f,
                          .seed = 42};
        const std::vector<double> p = filtered(kLogits, sampling);
        std::vector<int> counts(kLogits.size());
        for (int draw = 0; draw < 20000; ++draw) {
          sampling.draw = static_cast<std::uint64_t>(draw);
          const Sample drawn = draw_one(kernels, kLogits, sampling, 9);
          ++counts[drawn.token];
          if (!(std::abs(drawn.probability - p[drawn.token]) <= 1e-6)) {
            CHECK_NEAR(drawn.probability, p[drawn.token], 1e-6);
            break;
          }
        }
        const std::string where = "temperature " + show(temperature) + ", top_k " + show(top_k) +
                                  ", top_p " + show(top_p) + ": " + show(counts);
        CHECK_IN(where, chi_square_excess(counts, p) < 5);
        // Enough draws to tell this distribution from a warmer one on the same tokens.
        sampling.temperature *= 2.0f;
        sampling.top_p = 1.0f;
        sampling.min_p = 0.0f;
        sampling.top_k = static_cast<int>(std::ranges::count_if(p, [](double x) { return x > 0; }));
        if (sampling.top_k > 2) {
          CHECK_IN(where, !(chi_square_excess(counts, filtered(kLogits, sampling)) < 5));
        }
      }
    }
  }
}

TEST(sampler_over_positions_and_samples_is_as_random_as_over_draws) {
  const Kernels& kernels = *all_kernels().front();
  Sampling sampling{.temperature = 1.0f};
  const std::vector<double> p = filtered(kLogits, sampling);
  std::vector<int> by_position(kLogits.size()), by_sample(kLogits.size()), by_seed(kLogits.size());
  for (int i = 0; i < 20000; ++i) {
    ++by_position[draw_one(kernels, kLogits, sampling, i).token];
    Sampling other = sampling;
    other.sample_index = static_cast<std::uint64_t>(i);
    ++by_sample[draw_one(kernels, kLogits, other, 0).token];
    other = sampling;
    other.seed = static_cast<std::uint64_t>(i);
    ++by_seed[draw_one(kernels, kLogits, other, 0).token];
  }
  CHECK(chi_square_excess(by_position, p) < 5);
  CHECK(chi_square_excess(by_sample, p) < 5);
  CHECK(chi_square_excess(by_seed, p) < 5);
}

// Two draws whose keys differ in one part agree as often as independent ones, sum of p^2.
TEST(sampler_draws_with_different_keys_are_independent) {
  const Kernels& kernels = *all_kernels().front();
  const Sampling base{.temperature = 1.0f, .seed = 7};
  double agreement = 0;
  for (const double p : filtered(kLogits, base)) agreement += p * p;
  int same_seed = 0, same_draw = 0, same_sample = 0, same_position = 0, repeated = 0;
  constexpr int n = 20000;
  for (int i = 0; i < n; ++i) {
    Sampling sampling = base;
    sampling.draw = static_cast<std::uint64_t>(i);
    const TokenId token = draw_one(kernels, kLogits, sampling, 3).token;
    repeated += draw_one(kernels, kLogits, sampling, 3).token == token;
    same_position += draw_one(kernels, kLogits, sampling, 4).token == token;
    Sampling other = sampling;
    other.seed = 8;
    same_seed += draw_one(kernels, kLogits, other, 3).token == token;
    other = sampling;
    ++other.draw;
    same_draw += draw_one(kernels, kLogits, other, 3).token == token;
    other = sampling;
    other.sample_index = 1;
    same_sample += draw_one(kernels, kLogits, other, 3).token == token;
  }
  CHECK_EQ(repeated, n);
  const double tolerance = 5 * std::sqrt(n * agreement * (1 - agreement));
  for (const int same : {same_seed, same_draw, same_sample, same_position}) {
    CHECK_NEAR(same, n * agreement, tolerance);
  }
}

TEST(sampler_at_tiny_and_huge_temperatures) {
  const Kernels& kernels = *all_kernels().front();
  const std::vector<float> logits = {0.0f, 3.0f, kMinusInfinity, 2.999f};
  for (const float temperature : {1e-5f, 1e-20f, 1e-38f, 1e-45f}) {
    for (std::uint64_t seed = 0; seed < 100; ++seed) {
      const Sample drawn = draw_one(kernels, logits, {.temperature = temperature, .seed = seed}, 0);
      CHECK_EQ(drawn.token, 1);
      CHECK_EQ(drawn.probability, 1.0f);
    }
  }
  for (const float temperature : {1e10f, 1e30f, 3e38f}) {  // flat, but never an excluded token
    std::vector<int> counts(4);
    for (std::uint64_t seed = 0; seed < 3000; ++seed) {
      const Sample drawn = draw_one(kernels, logits, {.temperature = temperature, .seed = seed}, 0);
      ++counts[drawn.token];
      CHECK_NEAR(drawn.probability, 1.0 / 3, 1e-6);
    }
    CHECK(chi_square_excess(counts, {1 / 3.0, 1 / 3.0, 0, 1 / 3.0}) < 5);
  }
}

TEST(sampler_ties_at_the_cut_keep_the_lower_id) {
  const Kernels& kernels = *all_kernels().front();
  const std::vector<float> logits(40, 1.0f);
  std::set<TokenId> by_k, by_p;
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    by_k.insert(draw_one(kernels, logits, {.temperature = 1, .top_k = 3, .seed = seed}, 0).token);
    by_p.insert(
        draw_one(kernels, logits, {.temperature = 1, .top_p = 0.07f, .seed = seed}, 0).token);
  }
  CHECK(by_k == (std::set<TokenId>{0, 1, 2}));
  CHECK(by_p == (std::set<TokenId>{0, 1, 2}));  // 2 / 40 < 0.07 <= 3 / 40
}

// On a real vocabulary's size, and the same token from every kernel table.
TEST_ON_EVERY_ISA(sampler_on_a_large_vocabulary) {
  Random random(21);
  std::vector<float> logits = random.floats(50000, -4, 4);
  for (int i = 0; i < 20; ++i) logits[random.below(50000)] = 12.0f + static_cast<float>(i) * 0.1f;
  for (const Sampling base :
       {Sampling{.temperature = 1.0f}, Sampling{.temperature = 0.7f, .top_p = 0.9f},
        Sampling{.temperature = 1.5f, .top_k = 200, .top_p = 0.99f}}) {
    const std::vector<double> p = filtered(logits, base);
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      Sampling sampling = base;
      sampling.seed = seed;
      TokenId first = -1;
      for (const Kernels* kernels : tested_kernels()) {
        const Sample drawn = draw_one(*kernels, logits, sampling, 5);
        first = first < 0 ? drawn.token : first;
        CHECK_EQ(drawn.token, first);
        CHECK(p[drawn.token] > 0);
        CHECK_NEAR(drawn.probability, p[drawn.token], 1e-5 * p[drawn.token]);
      }
    }
  }
}

}  // namespace
}  // namespace sbd::cpu
