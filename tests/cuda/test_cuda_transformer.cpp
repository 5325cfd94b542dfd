// The forward on the cases of every backend, launched kernel by kernel or as a graph.
#include <cmath>
#include <numeric>

#include "cuda_device.h"
#include "transformer_cases.h"

namespace sbd::cuda {
namespace {

using namespace test;

TEST(cuda_transformer_rows_go_on_from_within_others) { check_branches(cuda_devices()); }

TEST(cuda_transformer_agrees_with_float64) { check_agrees_with_float64(cuda_devices(), kTypes); }

TEST(cuda_transformer_adapters_change_the_rows_that_ask) {
  check_adapters(cuda_devices());
  check_masks_of_adapters(cuda_devices());
}

TEST(cuda_transformer_rows_are_the_same_bits_however_they_are_computed) {
  const char* architectures[] = {"llama", "qwen2", "qwen3"};
  int round = 0;
  for (const DType dtype : kTypes) {
    const DType kv_dtype = kCacheTypes[round / 2 % 3];
    const std::string architecture = architectures[round++ % 3];
    auto device = std::make_unique<CudaDevice>();
    const CudaBackend& backend = device->backend();
    ForwardPaths paths(std::move(device), architecture, dtype, kv_dtype);
    paths.check_chunks();
    CHECK(backend.n_graph_replays() > 0);  // one row at a time, 38 times
    paths.check_batch();
  }
}

// A block's forwards want fewer and fewer rows.
TEST(cuda_transformer_graph_serves_any_wanted_rows) {
  const ModelConfig config = tiny_config("llama");
  MemoryTensors source(config, DType::bf16, true);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(32, DType::f16);
  Segment block = segment(random_tokens(12, 8), Attention::block, Kv::scratch);
  model.forward({{{&kv, {{block}}}}});  // in parts, while memory grows
  const auto all = model.forward({{{&kv, {{block}}}}});
  CHECK_EQ(backend.n_graph_replays(), 0);
  int replays = 0;
  for (const std::vector<int>& wanted : {std::vector<int>{0, 5, 11}, {7}, {2, 3}}) {
    block.outputs = wanted;
    const auto some = model.forward({{{&kv, {{block}}}}});
    CHECK_EQ(backend.n_graph_replays(), ++replays);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      CHECK_EQ(some[i].log_z, all[static_cast<std::size_t>(wanted[i])].log_z);
    }
  }
}

// Rows come with rules and without; the layers' graph serves both, and a row that asks for nothing
// is what it was.
TEST(cuda_transformer_graph_serves_rows_with_rules_and_without) {
  const ModelConfig config = tiny_config("qwen3");
  MemoryTensors source(config, DType::bf16, true);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(32, DType::f16);
  const Segment plain = segment(random_tokens(5, 9), Attention::block, Kv::scratch);
  Segment asking = plain;
  LogitRules rules{.allowed = std::vector<std::uint32_t>((kVocab + 31) / 32, 0x55555555u)};
  for (TokenId token = 0; token < kVocab; ++token) rules.adjustments.push_back({token, -1.0f});
  asking.asks.assign(5, {});
  asking.asks[2] = {.rules = std::make_shared<LogitRules>(rules), .n_best = 4, .given = 7};
  model.forward({{{&kv, {{plain}}}}});  // in parts, while memory grows
  const auto before = model.forward({{{&kv, {{plain}}}}});
  for (int replays = 1; replays < 6; replays += 2) {
    const auto asked = model.forward({{{&kv, {{asking}}}}});
    CHECK_EQ(backend.n_graph_replays(), replays);
    CHECK_EQ(asked[2].argmax % 2, 0);
    CHECK_EQ(asked[2].scores->best.size(), 4u);
    const auto behind = model.forward({{{&kv, {{plain}}}}});
    CHECK_EQ(backend.n_graph_replays(), replays + 1);
    CHECK(behind == before);
    for (const std::size_t row : {0u, 1u, 3u, 4u}) CHECK(asked[row] == before[row]);
    // Lists of every length, and the room they take.
    rules.adjustments.resize(rules.adjustments.size() / 2);
    asking.asks[2].rules = std::make_shared<LogitRules>(rules);
  }
}

// A prompt whose rows nobody wants leaves its kernels on the tape: they run before what follows.
TEST(cuda_transformer_fills_the_cache_without_outputs) {
  const ModelConfig config = tiny_config("qwen3");
  MemoryTensors source(config, DType::f32, true);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  const Tokens text = random_tokens(20, 6);
  KvCache a = model.make_kv(32, DType::f16);
  const auto whole = model.forward_logits({{{&a, {{segment(text)}}}}});
  {
    KvCache dropped = model.make_kv(32, DType::f16);  // freed with its kernels not yet run
    model.forward({{{&dropped, {{{.tokens = text}}}}}});
  }
  KvCache b = model.make_kv(32, DType::f16);
  CHECK(model.forward({{{&b, {{{.tokens = slice(text, 0, 19)}}}}}}).empty());
  const auto last = model.forward_logits({{{&b, {{segment(slice(text, 19, 20))}}}}});
  CHECK(identical(last, {whole.end() - kVocab, whole.end()}));
}

TEST(cuda_layers_in_sections_agree_with_float64) {
  ModelConfig config = tiny_config("qwen2");
  config.layer_sections = {1, 1, 1};
  config.num_hidden_layers = 3;
  MemoryTensors source(config, DType::f32, /*tied=*/false);
  const Float64Model reference(config, source);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  const Tokens tokens = random_tokens(9, 5);
  std::vector<Coefficients> factors;
  Plan plan;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    factors.push_back({1, i % 3 == 0 ? 1.0 : 0.0});
    plan.segments.push_back({.tokens = {tokens[i]},
                             .outputs = {0},
                             .e_factor = 1,
                             .h_factor = static_cast<float>(factors.back().b)});
  }
  KvCache kv = model.make_kv(40, DType::f32);
  std::vector<int> kv_end(tokens.size());
  std::iota(kv_end.begin(), kv_end.end(), 1);
  const double error = relative_error(model.forward_logits({{{&kv, plan}}}),
                                      reference.logits(tokens, kv_end, factors));
  CHECK_IN(show(error), error <= 1e-5);
}

TEST(cuda_transformer_overflow_of_the_cache_is_an_error) {
  check_overflow_of_the_cache(cuda_devices(), kTypes);
}

}  // namespace
}  // namespace sbd::cuda
