// Layers in sections, as Direct Multi-Token Decoding needs them: rows that leave one out, behind a
// cache whose length differs by section.
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "decode/dmtd.h"
#include "float64_model.h"
#include "model/transformer.h"
#include "reference.h"
#include "tiny_transformer.h"

namespace sbd {
namespace {

using namespace test;

constexpr int kPrompt = 7;
constexpr int kNew = 12;

ModelConfig cut_config(const std::string& architecture, const std::array<int, 3>& sections) {
  ModelConfig config = tiny_config(architecture);
  config.layer_sections = sections;
  config.num_hidden_layers = sections[0] + sections[1] + sections[2];
  return config;
}

struct Decoded {
  Tokens text;                // with the prompt
  std::vector<float> logits;  // of every row that decided a token
};

// Decodes with logits instead of statistics.
Decoded decode(Transformer& model, const DmtdMethod& method) {
  Decoded decoded{Tokens(kPrompt), {}};
  std::iota(decoded.text.begin(), decoded.text.end(), 3);
  DmtdDecoder decoder({.prompt = decoded.text,
                       .max_tokens = kNew,
                       .n_ctx = 40,
                       .eos_token_ids = {},
                       .sampling = {}},
                      method);
  KvCache kv = model.make_kv(40, DType::f32);
  for (;;) {
    const Plan plan = decoder.plan({5});
    const std::vector<float> logits = model.forward_logits({{{&kv, plan}}});
    std::vector<RowStats> stats;
    for (auto row = logits.begin(); row != logits.end(); row += kVocab) {
      const auto best = std::max_element(row, row + kVocab) - row;
      stats.push_back({.argmax = static_cast<TokenId>(best)});
    }
    decoded.logits.insert(decoded.logits.end(), logits.begin(), logits.end());
    const Events events = decoder.absorb(plan, stats);
    for (const TokenId token : events.committed) decoded.text.push_back(token);
    if (events.finished) return decoded;
  }
}

// methods.md's table, row by row.
Coefficients coefficients(int position, const DmtdMethod& method) {
  const bool train = method.prompt_rule == DmtdPromptRule::train;
  const bool head = (position - (train ? 0 : kPrompt)) % method.horizon == 0;
  if (position >= kPrompt || train) return {1, head ? 1.0 : 0.0};
  return method.prompt_rule == DmtdPromptRule::plain ? Coefficients{0, 1} : Coefficients{1, 1};
}

TEST(dmtd_rows_are_those_of_one_full_forward) {
  for (const auto& [architecture, sections] :
       std::vector<std::pair<std::string, std::array<int, 3>>>{
           {"llama", {0, 2, 1}}, {"qwen2", {1, 1, 1}}, {"qwen3", {2, 2, 1}}}) {
    const ModelConfig config = cut_config(architecture, sections);
    MemoryTensors source(config, DType::f32, /*tied=*/false);
    const Float64Model reference(config, source);
    cpu::CpuBackend backend(2);
    Transformer model(config, source, backend);
    for (const DmtdPromptRule rule :
         {DmtdPromptRule::all_heads, DmtdPromptRule::plain, DmtdPromptRule::train}) {
      for (int horizon = 1; horizon <= 5; ++horizon) {
        const DmtdMethod method{.horizon = horizon, .prompt_rule = rule};
        const Decoded decoded = decode(model, method);
        const int n = kPrompt + kNew - 1;  // the last token's row never runs
        const Tokens rows(decoded.text.begin(), decoded.text.begin() + n);

        // The engine's own forward over all of it at once: the same bits.
        Plan plan;
        std::vector<Coefficients> factors;
        for (int i = 0; i < n; ++i) {
          factors.push_back(coefficients(i, method));
          plan.segments.push_back({.tokens = {rows[static_cast<std::size_t>(i)]},
                                   .e_factor = static_cast<float>(factors.back().a),
                                   .h_factor = static_cast<float>(factors.back().b)});
          if (i >= kPrompt - 1) plan.segments.back().outputs = {0};
        }
        KvCache kv = model.make_kv(40, DType::f32);
        const std::vector<float> whole = model.forward_logits({{{&kv, plan}}});
        const std::string where =
            format("{} horizon {} rule {}", architecture, horizon, static_cast<int>(rule));
        CHECK_IN(where, whole.size() == decoded.logits.size() &&
                            same_bits(whole.data(), decoded.logits.data(), whole.size()));

        // And the definition in float64.
        std::vector<int> kv_end(static_cast<std::size_t>(n));
        std::iota(kv_end.begin(), kv_end.end(), 1);
        Matrix expected = reference.logits(rows, kv_end, factors);
        expected.erase(expected.begin(), expected.begin() + (kPrompt - 1) * kVocab);
        double largest = 0;
        for (const double logit : expected) largest = std::max(largest, std::abs(logit));
        CHECK_CLOSE(where, whole, expected, Matrix(expected.size(), 1e-4 * largest));
      }
    }
  }
}

// A sequence whose rows skip layers, and one whose rows do not.
TEST(different_sections_share_a_forward) {
  const ModelConfig config = cut_config("qwen3", {1, 1, 1});
  MemoryTensors source(config, DType::f32, /*tied=*/true);
  cpu::CpuBackend backend(1);
  Transformer model(config, source, backend);
  const auto alone = [&](const Plan& first, const Plan& second) {
    KvCache kv = model.make_kv(20, DType::f32);
    model.forward_logits({{{&kv, first}}});
    return model.forward_logits({{{&kv, second}}});
  };
  const Plan prompt{.segments = {{.tokens = {1, 2, 3}}}};
  const Plan skip{
      .segments = {
          {.tokens = {4}, .outputs = {0}, .layers = Layers::skip, .e_factor = 1, .h_factor = 0}}};
  const Plan block{
      .segments = {
          {.tokens = {5, 6}, .attention = Attention::block, .kv = Kv::scratch, .outputs = {0, 1}}}};
  std::vector<float> expected = alone(prompt, skip);
  for (const float logit : alone(prompt, block)) expected.push_back(logit);

  KvCache a = model.make_kv(20, DType::f32), b = model.make_kv(20, DType::f32);
  model.forward_logits({{{&a, prompt}, {&b, prompt}}});
  const std::vector<float> together = model.forward_logits({{{&a, skip}, {&b, block}}});
  CHECK(together.size() == expected.size() &&
        same_bits(together.data(), expected.data(), expected.size()));
  CHECK_EQ(a.lengths(), (std::array<int, 3>{4, 3, 4}));
  CHECK_EQ(a.length(), 3);
  CHECK_EQ(b.lengths(), (std::array<int, 3>{3, 3, 3}));
}

TEST(rows_must_continue_what_each_section_has_cached) {
  const ModelConfig config = cut_config("llama", {0, 1, 1});
  MemoryTensors source(config, DType::f32, /*tied=*/true);
  cpu::CpuBackend backend(1);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(20, DType::f32);
  const auto run = [&](Layers layers, int start, const Tokens& tokens) {
    model.forward({{{&kv, {.segments = {{.tokens = tokens, .layers = layers}}, .start = start}}}});
  };
  run(Layers::all, 0, {1, 2});
  run(Layers::skip, 2, {3});
  CHECK_THROWS_WITH(run(Layers::all, 3, {4}), "from position 3 on do not continue the 2 cached");
  CHECK_THROWS_WITH(run(Layers::skip, 4, {4}), "from position 4 on do not continue the 3 cached");
  CHECK_EQ(kv.lengths(), (std::array<int, 3>{3, 2, 3}));
  run(Layers::refill, 2, {3});
  CHECK_EQ(kv.lengths(), (std::array<int, 3>{3, 3, 3}));
  const Plan wanted{.segments = {{.tokens = {4}, .outputs = {0}, .layers = Layers::refill}}};
  CHECK_THROWS_WITH(model.forward({{{&kv, wanted}}}), "output row 0 of a segment of 0 rows");
  const Plan adapted{.segments = {{.tokens = {4}, .adapted = true}}};
  CHECK_THROWS_WITH(model.forward({{{&kv, adapted}}}), "asks for an adapter, and none is loaded");
  run(Layers::all, 1, {5});  // back, and over what was cached
  CHECK_EQ(kv.lengths(), (std::array<int, 3>{2, 2, 2}));
}

}  // namespace
}  // namespace sbd
