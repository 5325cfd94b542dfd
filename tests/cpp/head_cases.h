// What the LM head is tested with on every backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "draw_one.h"
#include "head_reference.h"
#include "reference.h"

namespace sbd::test {

inline LogitRules random_rules(Random& random, int vocab, TokenId mask) {
  LogitRules rules;
  for (TokenId token = random.below(20); token < vocab; token += 1 + random.below(40)) {
    rules.adjustments.push_back({.token = token,
                                 .bias = static_cast<float>(random.below(9) - 4),
                                 .factor = random.below(2) == 0 ? 1.0f : 1.5f,
                                 .penalty = static_cast<float>(random.below(3)) / 2});
  }
  if (random.below(3) == 0) rules.adjustments.clear();
  if (random.below(2) == 0) return rules;
  rules.allowed.assign(static_cast<std::size_t>(vocab + 31) / 32, 0);
  for (int i = 0; i < 20; ++i) {
    const int token = random.below(vocab);
    rules.allowed[static_cast<std::size_t>(token / 32)] |= 1u << (token % 32);
  }
  const int sure = mask == 0 ? 1 : 0;
  rules.allowed[0] |= 1u << sure;
  return rules;
}

// Rows that ask for anything, in any combination; every third is drawn. Some share their rules.
inline std::vector<OutputRow> asking_rows(int n, int vocab, TokenId mask, Random& random) {
  std::vector<OutputRow> rows;
  std::shared_ptr<const LogitRules> rules;
  for (int row = 0; row < n; ++row) {
    OutputRow output{row, 100 + row, {}};
    if (row % 3 == 1) {
      output.sampling = {.temperature = 0.8f,
                         .top_k = row % 2 * 40,
                         .top_p = row % 4 == 0 ? 0.9f : 1.0f,
                         .min_p = static_cast<float>(random.below(3)) * 0.1f,
                         .seed = random.bits()};
    }
    if (row % 4 == 1) rules = std::make_shared<LogitRules>(random_rules(random, vocab, mask));
    if (row % 4 != 0) output.ask.rules = rules;
    if (row % 5 < 3) output.ask.n_best = row == 0 ? 20 : random.below(6);
    if (row % 5 < 2) output.ask.given = random.below(vocab);
    rows.push_back(output);
  }
  return rows;
}

inline void check_statistics_of_every_vocabulary_and_mask(Backend& backend,
                                                          const std::vector<int>& vocabularies,
                                                          double relative) {
  for (const int vocab : vocabularies) {
    Random random(static_cast<std::uint64_t>(vocab));
    const Logits logits = kinds_of_rows(vocab, random);
    const HeadInput head = chosen_head(backend, logits);
    for (const TokenId mask : {-1, 0, vocab / 2, vocab - 1}) {
      if (vocab == 1 && mask == 0) continue;  // no token would be left
      const auto stats = head.stats(backend, mask);
      for (std::size_t row = 0; row < logits.size(); ++row) {
        const std::string wrong = wrong_greedy(stats[row], ruled(logits[row], mask), relative);
        CHECK_IN(backend.description() + ", vocabulary " + show(vocab) + ", mask " + show(mask) +
                     ", row " + show(row) + ": " + wrong,
                 wrong.empty());
      }
    }
    CHECK(head.logits(backend) == logits);
  }
}

// Of the logits that the backend itself computes from weights of a type.
inline void check_rules_and_scores(Backend& backend, DType dtype, double relative) {
  Random random(5);
  constexpr int rows = 36, vocab = 1300, mask = 700;
  const HeadInput head = random_head(backend, dtype, rows, vocab, 0.5, random);
  const Logits logits = head.logits(backend);
  const auto outputs = asking_rows(rows, vocab, mask, random);
  const auto stats = head.stats(backend, outputs, mask);
  for (std::size_t row = 0; row < outputs.size(); ++row) {
    const auto& [_, position, sampling, ask] = outputs[row];
    const auto under_rules = ruled(logits[row], mask, ask.rules ? *ask.rules : LogitRules{});
    // What is adjusted is rounded, by a few units of a logit's size.
    const double rounding = ask.rules ? 6 * kEps * std::abs(stats[row].log_z) : 0;
    std::string wrong = wrong_field(stats[row], under_rules, relative, rounding);
    if (wrong.empty() && sampling.temperature > 0) {
      wrong = wrong_draw(stats[row], under_rules, sampling);
    }
    if (wrong.empty()) wrong = wrong_scores(stats[row], ask, logits[row]);
    CHECK_IN(backend.description() + ", " + std::string(name(dtype)) + ", row " + show(row) + ": " +
                 wrong,
             wrong.empty());
  }
}

// Equal logits: the lower id first, within a run of the vocabulary and across; more best tokens
// than a run has, and all there are; tokens that only the scores know, the mask token among them.
inline void check_scores_of_equals(Backend& backend) {
  for (const int vocab : {1, 3, 128, 129, 600}) {
    Logits logits(3, std::vector<float>(static_cast<std::size_t>(vocab), 1.5f));
    for (int id = 0; id < vocab; ++id)
      logits[1][static_cast<std::size_t>(id)] = id % 2 ? 2.0f : -0.0f;
    for (int id = 0; id < vocab; id += 4) logits[1][static_cast<std::size_t>(id)] = 0.0f;
    for (int id = 0; id < vocab; ++id)
      logits[2][static_cast<std::size_t>(id)] = static_cast<float>(id % 7);
    const HeadInput head = chosen_head(backend, logits);
    const TokenId mask = vocab == 1 ? -1 : vocab / 2;
    for (const int n_best : {0, std::min(vocab, 3), std::min(vocab, 130)}) {
      for (const TokenId given : {-1, 0, vocab / 2, vocab - 1}) {
        auto outputs = head.all_rows();
        for (OutputRow& output : outputs) {
          output.ask = {.n_best = n_best, .given = given};
          if (output.row == 2) output.ask.n_best = 0;  // not all rows ask for as many
        }
        const auto stats = head.stats(backend, outputs, mask);
        for (std::size_t row = 0; row < outputs.size(); ++row) {
          const std::string wrong = wrong_scores(stats[row], outputs[row].ask, logits[row]);
          CHECK_IN("vocabulary " + show(vocab) + ", best " + show(n_best) + ", given " +
                       show(given) + ", row " + show(row) + ": " + wrong,
                   wrong.empty());
        }
      }
    }
  }
}

// Rules that leave one token, that move one over all others, that exclude by a bias.
inline void check_rules_at_their_ends(Backend& backend) {
  const Logits logits = {{1.0f, 3.0f, -2.0f, 2.0f}};
  const HeadInput head = chosen_head(backend, logits);
  const auto stats = [&](LogitRules rules, float temperature = 0) {
    OutputRow output{0, 0, {.temperature = temperature}};
    output.ask = {.rules = std::make_shared<LogitRules>(std::move(rules)), .n_best = 1};
    return head.stats(backend, {output}, -1)[0];
  };
  for (const float temperature : {0.0f, 1.0f, 1e30f}) {
    const RowStats only = stats({.allowed = {4u}}, temperature);
    CHECK_EQ(only.sampled, 2);
    CHECK_EQ(only.sampled_probability, 1.0f);
    CHECK_EQ(only.entropy, 0.0f);
    CHECK_EQ(only.scores->token.token, 2);
    CHECK_EQ(only.scores->best[0].token, 1);
    CHECK_NEAR(only.scores->token.logprob - only.scores->best[0].logprob, -5, 1e-6);
  }
  const RowStats excluded = stats({.adjustments = {{.token = 1, .bias = -INFINITY}}});
  CHECK_EQ(excluded.argmax, 3);
  CHECK_NEAR(excluded.top_probability, 1 / (1 + std::exp(-1.0) + std::exp(-4.0)), 1e-6);
  // 3 / 4, less than 1, which is less than (-2 + 1) * 0.5 + 2; 2 - 1.5 is the least of all.
  const RowStats moved =
      stats({.adjustments = {{.token = 1, .factor = 4.0f},
                             {.token = 2, .bias = 1, .factor = 0.5f, .penalty = -2},
                             {.token = 3, .penalty = 1.5f}}});
  CHECK_EQ(moved.argmax, 2);
  CHECK_NEAR(moved.log_z, std::log(std::exp(1.0) + std::exp(0.75) + std::exp(1.5) + std::exp(0.5)),
             1e-6);
}

// A row's bits depend on no other row and on what no other row asks for. Returns those of all rows.
inline std::vector<RowStats> check_rows_alone(Backend& backend, DType dtype, int vocab) {
  Random random(11);
  constexpr int rows = 150, mask = 7;  // more than two blocks of rows
  const HeadInput head = random_head(backend, dtype, rows, vocab, 0.3, random);
  const auto outputs = asking_rows(rows, vocab, mask, random);
  const auto all = head.stats(backend, outputs, mask);
  auto plain = outputs;
  for (OutputRow& output : plain) {
    if (!output.ask.rules) output.ask = {};
  }
  const auto fewer_asks = head.stats(backend, plain, mask);
  for (const std::size_t row : {0u, 1u, 3u, 4u, 63u, 64u, 65u, 70u, 140u, 149u}) {
    CHECK_IN(show(row), same(head.stats(backend, {outputs[row]}, mask)[0], all[row]));
    RowStats without = all[row];
    if (!outputs[row].ask.rules) without.scores = nullptr;
    CHECK_IN(show(row), same(fewer_asks[row], without));
  }
  const auto two = head.stats(backend, {outputs[3], outputs[140]}, mask);
  CHECK(same(two[0], all[3]) && same(two[1], all[140]));
  return all;
}

struct Draws {
  int all = 0, same = 0;
};

// Draws under rules and without, beside the CPU's of the same logits; statistics are untempered.
// `tolerance`: of a probability, relative.
inline Draws check_draws_beside(const cpu::Kernels& kernels, Backend& backend, double tolerance) {
  Random random(12);
  constexpr int vocab = 9500;
  const TokenId mask = 600;
  Logits logits = {random.floats(vocab, -2, 2), random.floats(vocab, -6, 6)};
  logits.emplace_back(vocab, 1.0f);  // ties: the lower id is kept
  logits[1][4000] = -0.0f;
  const HeadInput head = chosen_head(backend, logits);
  LogitRules rules;
  rules.allowed.assign(vocab / 32 + 1, 0x0ff0f00fu);
  for (TokenId token = 3; token < vocab; token += 50) {  // exact in float32
    rules.adjustments.push_back({.token = token, .bias = 4, .factor = 2, .penalty = 0.5f});
  }
  const auto shared_rules = std::make_shared<LogitRules>(rules);
  const std::vector<Sampling> plain = {{.temperature = 1.0f},
                                       {.temperature = 0.8f, .top_k = 40, .top_p = 0.9f},
                                       {.temperature = 0.7f, .top_p = 0.5f},
                                       {.temperature = 1.5f, .top_k = 3},
                                       {.temperature = 1e-20f},
                                       {.temperature = 1e30f, .top_k = 5, .top_p = 0.7f},
                                       {.temperature = 1.2f, .min_p = 0.05f}};
  const std::vector<Sampling> under_rules = {
      {.temperature = 1.0f},
      {.temperature = 1.0f, .top_k = 60, .top_p = 0.95f, .min_p = 0.6f},
      {.temperature = 0.9f, .min_p = 1.0f}};
  Draws draws;
  for (const bool with_rules : {false, true}) {
    const auto rows = [&](const Sampling& sampling) {
      auto outputs = head.all_rows(sampling);
      for (OutputRow& output : outputs) {
        if (with_rules) output.ask.rules = shared_rules;
      }
      return head.stats(backend, outputs, mask);
    };
    const auto greedy = rows({});
    std::uint64_t seed = 0;
    for (Sampling sampling : with_rules ? under_rules : plain) {
      for (int i = 0; i < (with_rules ? 1 : 4); ++i, ++seed) {
        sampling.seed = seed;
        sampling.sample_index = seed % 2;
        sampling.draw = seed;
        const auto stats = rows(sampling);
        for (std::size_t row = 0; row < logits.size(); ++row) {
          std::vector<float> left;
          for (const double logit : ruled(logits[row], mask, with_rules ? rules : LogitRules{})) {
            left.push_back(logit == -INFINITY ? cpu::kMinusInfinity : static_cast<float>(logit));
          }
          const cpu::Sample drawn =
              cpu::draw_one(kernels, left, sampling, 100 + static_cast<int>(row));
          ++draws.all;
          if (stats[row].sampled == drawn.token) {
            ++draws.same;
            // The CPU's sums are in float32: others' are compared with float64.
            const double p = tolerance == 0
                                 ? drawn.probability
                                 : filtered(left, sampling)[static_cast<std::size_t>(drawn.token)];
            CHECK_NEAR(stats[row].sampled_probability, p, tolerance * p);
          }
          RowStats untempered = stats[row];
          untempered.sampled = greedy[row].sampled;
          untempered.sampled_probability = greedy[row].sampled_probability;
          CHECK(untempered == greedy[row]);
        }
      }
    }
  }
  return draws;
}

// Wherever a logit is not finite; where it is only so far down that it cannot be told from an
// excluded token's.
inline void check_refusal_of_logits_not_finite(Backend& backend) {
  const char* const said = "the model computed logits that are NaN or infinite";
  for (const DType dtype : kDTypes) {
    Random random(13);
    const int cols = short_row(dtype);
    const auto stored = random_matrix("output.weight", dtype, 600, cols, 0.5, random);
    HeadInput head{backend.load_weight(stored.view()), nullptr, 2};
    const std::vector<OutputRow> outputs = {{0, 0, {}}, {1, 1, {.temperature = 1.0f}}};
    const auto x = random.floats(static_cast<std::size_t>(2 * cols), -1, 1);
    head.x = backend.upload(x);
    head.stats(backend, outputs, 3);
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      for (const int at : {0, 20, 2 * cols - 1}) {
        auto damaged = x;
        damaged[static_cast<std::size_t>(at)] = bad;
        head.x = backend.upload(damaged);
        CHECK_THROWS_WITH(head.stats(backend, outputs, 3), said);
      }
    }
  }
  // Beyond float32.
  HeadInput head = chosen_head(backend, {{1.0f, 3e38f, 2.0f}});
  for (const float factor : {10.0f, -10.0f}) {
    head.x = backend.upload(std::vector<float>{factor});
    CHECK_THROWS_WITH(head.stats(backend, -1), said);
    // Its rules may exclude the token, but its scores know of it.
    auto outputs = head.all_rows();
    outputs[0].ask = {.rules = std::make_shared<LogitRules>(LogitRules{.allowed = {5u}}),
                      .n_best = 1};
    CHECK_THROWS_WITH(head.stats(backend, outputs, -1), said);
  }
  CHECK_THROWS_WITH(chosen_head(backend, {{-2e30f, -3e30f}}).stats(backend, -1), said);
}

}  // namespace sbd::test
