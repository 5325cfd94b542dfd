// Rules and scores of a forward's rows (the head's: head_cases.h), and what a text asks for as it
// grows.
#include <cmath>

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
  std::vector<std::uint32_t> allowed(41);
  CHECK_THROWS_WITH(run({{}, allowed}), "no token is allowed here");
  allowed[700 / 32] = 1u << 700 % 32;  // the mask token
  allowed[40] = 1u << 20;              // beyond the vocabulary
  CHECK_THROWS_WITH(run({{}, allowed}), "no token is allowed here");
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
  Segment segment{.tokens = {1}, .outputs = {0}};
  TextRules({}, prompt).ask_all(segment);
  CHECK(segment.asks.empty());
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
