// Rules on logits and scores of rows: the head's statistics against plain arithmetic on the same
// logits, and what a text asks for as it grows.
#include <cmath>
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "decode/ntp.h"
#include "decode/text_rules.h"
#include "model/transformer.h"
#include "scripted.h"
#include "transformer_cases.h"

namespace sbd {
namespace {

using namespace test;
using test::segment;

// A vocabulary of several runs of the head, the last one short.
ModelConfig wide_config() {
  ModelConfig config = tiny_config("qwen3");
  config.vocab_size = 1300;
  config.mask_token_id = 700;
  return config;
}

LogitRules random_rules(Random& random, int vocab) {
  LogitRules rules;
  for (TokenId token = 0; token < vocab; token += 1 + random.below(40)) {
    rules.adjustments.push_back({.token = token,
                                 .bias = static_cast<float>(random.below(9) - 4),
                                 .factor = random.below(2) == 0 ? 1.0f : 1.5f,
                                 .penalty = static_cast<float>(random.below(3)) / 2});
  }
  if (random.below(2) == 0) return rules;
  rules.allowed.assign(static_cast<std::size_t>(vocab + 31) / 32, 0);
  for (int i = 0; i < 20; ++i) {
    const int token = random.below(vocab);
    rules.allowed[static_cast<std::size_t>(token / 32)] |= 1u << (token % 32);
  }
  return rules;
}

double under(const LogitRules& rules, TokenId token, double logit) {
  for (const Adjustment& one : rules.adjustments) {
    if (one.token != token) continue;
    logit += one.bias;
    logit = logit > 0 ? logit / one.factor : logit * one.factor;
    logit -= one.penalty;
  }
  const auto word = static_cast<std::size_t>(token / 32);
  const bool allowed = rules.allowed.empty() || (rules.allowed[word] >> (token % 32) & 1) != 0;
  return allowed ? logit : -INFINITY;
}

double log_sum(const std::vector<double>& logits) {
  const double top = *std::ranges::max_element(logits);
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - top);
  return top + std::log(sum);
}

TEST(rows_under_rules_and_scores_are_plain_arithmetic) {
  const ModelConfig config = wide_config();
  MemoryTensors source(config, DType::f32, false);
  cpu::CpuBackend backend(2);
  Transformer model(config, source, backend);
  Random random(5);
  const Tokens tokens = random_tokens(70, 3);
  KvCache kv = model.make_kv(128, DType::f32);
  const std::vector<float> logits = model.forward_logits({{{&kv, {{segment(tokens)}}}}});

  Segment asked = segment(tokens);
  for (std::size_t row = 0; row < tokens.size(); ++row) {
    RowAsk ask;
    if (row % 3 != 0) {
      ask.rules = std::make_shared<LogitRules>(random_rules(random, config.vocab_size));
    }
    if (row % 2 == 0) ask.n_best = random.below(21);
    if (row % 4 == 0) ask.given = random.below(config.vocab_size);
    asked.asks.push_back(ask);
  }
  KvCache again = model.make_kv(128, DType::f32);
  const std::vector<RowStats> stats = model.forward({{{&again, {{asked}}}}});
  for (std::size_t row = 0; row < tokens.size(); ++row) {
    const RowAsk& ask = asked.asks[row];
    std::vector<double> raw, ruled;
    for (int token = 0; token < config.vocab_size; ++token) {
      raw.push_back(logits[row * static_cast<std::size_t>(config.vocab_size) +
                           static_cast<std::size_t>(token)]);
      const double own = token == config.mask_token_id ? -INFINITY : raw.back();
      ruled.push_back(ask.rules ? under(*ask.rules, token, own) : own);
    }
    const auto best = std::ranges::max_element(ruled) - ruled.begin();
    CHECK_EQ(stats[row].argmax, best);
    const double log_z = log_sum(ruled);
    CHECK_NEAR(stats[row].log_z, log_z, 1e-4);
    CHECK_NEAR(stats[row].top_probability, std::exp(ruled[static_cast<std::size_t>(best)] - log_z),
               1e-5);
    double entropy = 0;
    for (const double logit : ruled) {
      if (std::isfinite(logit)) entropy -= std::exp(logit - log_z) * (logit - log_z);
    }
    CHECK_NEAR(stats[row].entropy, entropy, 1e-4);

    CHECK_EQ(stats[row].scores != nullptr, ask.n_best >= 0);
    if (ask.n_best < 0) continue;
    const RowScores& scores = *stats[row].scores;
    const double raw_z = log_sum(raw);
    const auto token = static_cast<std::size_t>(scores.token.token);
    CHECK_EQ(scores.token.token, ask.given >= 0 ? ask.given : static_cast<TokenId>(best));
    CHECK_NEAR(scores.token.logprob, raw[token] - raw_z, 1e-4);
    std::vector<int> order(raw.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](int a, int b) {
      return raw[static_cast<std::size_t>(a)] > raw[static_cast<std::size_t>(b)];
    });
    if (ask.given >= 0) CHECK_EQ(scores.rank, std::ranges::find(order, ask.given) - order.begin());
    CHECK_EQ(static_cast<int>(scores.best.size()), ask.n_best);
    for (std::size_t i = 0; i < scores.best.size(); ++i) {
      CHECK_EQ(scores.best[i].token, order[i]);
      CHECK_NEAR(scores.best[i].logprob, raw[static_cast<std::size_t>(order[i])] - raw_z, 1e-4);
    }
  }
}

TEST(rows_without_asks_are_the_same_bits_beside_rows_with) {
  const ModelConfig config = wide_config();
  MemoryTensors source(config, DType::f32, false);
  cpu::CpuBackend backend(2);
  Transformer model(config, source, backend);
  const Tokens tokens = random_tokens(9, 4);
  const auto run = [&](bool ask) {
    Segment all = segment(tokens);
    all.sampling = {.temperature = 0.9f, .top_k = 30, .min_p = 0.1f, .seed = 5};
    if (ask) all.asks.assign(tokens.size(), {.n_best = 3});
    KvCache kv = model.make_kv(64, DType::f32);
    return model.forward({{{&kv, {{all}}}}});
  };
  const auto plain = run(false), asked = run(true);
  for (std::size_t i = 0; i < plain.size(); ++i) {
    CHECK_EQ(plain[i].entropy, asked[i].entropy);
    CHECK_EQ(plain[i].sampled, asked[i].sampled);
    CHECK_EQ(plain[i].sampled_probability, asked[i].sampled_probability);
    CHECK_EQ(asked[i].scores->token.token, asked[i].sampled);
  }
}

TEST(rows_refuse_rules_that_are_none) {
  const ModelConfig config = wide_config();
  MemoryTensors source(config, DType::f32, false);
  cpu::CpuBackend backend(1);
  Transformer model(config, source, backend);
  const auto run = [&](const LogitRules& rules, int n_best = -1) {
    Segment one = segment({1});
    one.asks = {{.rules = std::make_shared<LogitRules>(rules), .n_best = n_best}};
    KvCache kv = model.make_kv(64, DType::f32);
    model.forward({{{&kv, {{one}}}}});
  };
  CHECK_THROWS_WITH(run({{}, {1, 2}}), "of 41 words, one bit for each of 1300 tokens, got 2");
  CHECK_THROWS_WITH(run({{}, std::vector<std::uint32_t>(41)}), "no token is allowed here");
  CHECK_THROWS_WITH(run({{{.token = 5}, {.token = 5}}, {}}), "ascending");
  CHECK_THROWS_WITH(run({{{.token = 1300}}, {}}), "below 1300");
  CHECK_THROWS_WITH(run({{{.token = 1, .bias = NAN}}, {}}), "token 1: expected a bias");
  CHECK_THROWS_WITH(run({}, 1301), "1301 best tokens are beyond the vocabulary of 1300");
}

std::string text(const RowAsk& ask) {
  std::string out = std::to_string(ask.n_best);
  if (!ask.rules) return out;
  for (const Adjustment& one : ask.rules->adjustments) {
    out += format(" {}:{}/{}-{}", one.token, one.bias, one.factor, one.penalty);
  }
  return out;
}

TEST(text_rules_grow_with_the_text) {
  const Tokens prompt{3, 3, 4};
  CHECK(TextRules({}, prompt).none());
  TextRules rules({.logit_bias = {{4, -1.0f}, {9, 2.0f}},
                   .presence_penalty = 0.5f,
                   .frequency_penalty = 0.25f,
                   .repetition_penalty = 1.5f,
                   .logprobs = 2},
                  prompt);
  CHECK_EQ(text(rules.ask()), "2 3:0/1.5-0 4:-1/1.5-0 9:2/1-0");
  rules.add(9);
  rules.add(9);
  CHECK_EQ(text(rules.ask()), "2 3:0/1.5-0 4:-1/1.5-0 9:2/1.5-1");
  CHECK_EQ(text(rules.ask(Tokens{5, 9})), "2 3:0/1.5-0 4:-1/1.5-0 5:0/1.5-0.75 9:2/1.5-1.25");
  CHECK_EQ(text(rules.ask()), "2 3:0/1.5-0 4:-1/1.5-0 9:2/1.5-1");  // a draft is no text
}

TEST(text_rules_refuse_what_is_out_of_range) {
  const auto check = [](const RuleOptions& options) { TextRules rules(options, {}); };
  CHECK_THROWS_WITH(check({.presence_penalty = 2.5f}), "`presence_penalty` from -2 to 2, got 2.5");
  CHECK_THROWS_WITH(check({.frequency_penalty = NAN}), "`frequency_penalty` from -2 to 2");
  CHECK_THROWS_WITH(check({.repetition_penalty = 0}), "`repetition_penalty` above 0");
  CHECK_THROWS_WITH(check({.logit_bias = {{1, NAN}}}), "`logit_bias` below infinity");
  CHECK_THROWS_WITH(check({.logit_bias = {{1, 0}, {1, 2}}}), "names token 1 twice");
}

}  // namespace
}  // namespace sbd
