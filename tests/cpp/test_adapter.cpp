// LoRA adapter files: what is read, each wrong one's own line, and how a model decodes beside one.
#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"
#include "check.h"
#include "complete_model.h"
#include "decode_defaults.h"

namespace sbd {
namespace {

using namespace test;

ModelConfig small_config() {
  ModelConfig config;
  config.architecture = "llama";
  config.num_hidden_layers = 3;
  config.hidden_size = 8;
  config.intermediate_size = 10;
  config.num_attention_heads = 2;
  config.num_key_value_heads = 1;
  config.head_dim = 3;  // 6 values are attended
  config.max_position_embeddings = 100;
  return config;
}

std::string tensor_name(const std::string& matrix, int layer, char side) {
  return format("blk.{}.{}.weight.lora_{}", layer, matrix, side);
}

GgufTensor part(int layer, char side, std::vector<std::uint64_t> dimensions,
                const std::string& matrix = "attn_output") {
  return filled_tensor(tensor_name(matrix, layer, side), std::move(dimensions), gguf_tensor::f32);
}

GgufTensor mask(std::uint64_t hidden = 8) {
  return filled_tensor("sbd.draft.mask_embedding", {hidden}, gguf_tensor::f32);
}

GgufBuilder keys(const std::string& type = "adapter", const std::string& method = "lora",
                 const std::string& architecture = "llama") {
  GgufBuilder builder;
  builder.text("general.type", type);
  builder.text("adapter.type", method);
  builder.text("general.architecture", architecture);
  return builder;
}

// Rank 2 in layers 0 and 2.
GgufBuilder adapter_file(float alpha = 4) {
  GgufBuilder builder = keys();
  builder.f32("adapter.lora.alpha", alpha);
  for (const int layer : {0, 2}) {
    builder.tensor(part(layer, 'a', {6, 2})).tensor(part(layer, 'b', {2, 8}));
  }
  return builder;
}

Adapter load(const GgufBuilder& builder) {
  const MemoryFile file(builder.build());
  cpu::CpuBackend backend(1);
  return load_adapter(GgufFile(file.path()), small_config(), backend);
}

TEST(adapter_of_some_layers) {
  const Adapter adapter = load(adapter_file());
  CHECK_EQ(adapter.layers.size(), 3);
  for (int i = 0; i < 3; ++i) {
    const Adapter::Layer& layer = adapter.layers[static_cast<std::size_t>(i)];
    CHECK_EQ(layer.o.a != nullptr, i != 1);
    CHECK_EQ(layer.o.b != nullptr, i != 1);
    CHECK_EQ(layer.o.scale, i == 1 ? 0.0f : 2.0f);
    CHECK(layer.q.a == nullptr && layer.down.b == nullptr);
  }
  CHECK(adapter.mask_embedding == nullptr);
  CHECK_EQ(load(adapter_file(-1)).layers[0].o.scale, -0.5f);
}

// Each has a rank and so a scale of its own.
TEST(adapter_of_every_matrix) {
  GgufBuilder builder = adapter_file();
  const struct {
    const char* name;
    std::uint64_t out, in, rank;
    Adapter::Pair Adapter::Layer::* pair;
  } places[] = {
      {"attn_q", 6, 8, 1, &Adapter::Layer::q},   {"attn_k", 3, 8, 3, &Adapter::Layer::k},
      {"attn_v", 3, 8, 2, &Adapter::Layer::v},   {"ffn_gate", 10, 8, 8, &Adapter::Layer::gate},
      {"ffn_up", 10, 8, 5, &Adapter::Layer::up}, {"ffn_down", 8, 10, 4, &Adapter::Layer::down}};
  for (const auto& place : places) {
    builder.tensor(part(1, 'a', {place.in, place.rank}, place.name));
    builder.tensor(part(1, 'b', {place.rank, place.out}, place.name));
  }
  const Adapter adapter = load(builder.tensor(mask()));
  for (const auto& place : places) {
    const Adapter::Pair& pair = adapter.layers[1].*place.pair;
    CHECK_EQ(pair.a->rows(), static_cast<int>(place.rank));
    CHECK_EQ(pair.a->cols(), static_cast<int>(place.in));
    CHECK_EQ(pair.b->rows(), static_cast<int>(place.out));
    CHECK_EQ(pair.scale, 4.0f / static_cast<float>(place.rank));
  }
  CHECK(adapter.mask_embedding != nullptr);
}

TEST(adapter_of_a_quantised_model_is_quantised_where_it_can_be) {
  ModelConfig config = small_config();
  config.hidden_size = 64;
  config.intermediate_size = 96;
  GgufBuilder builder = keys();
  builder.f32("adapter.lora.alpha", 1);
  for (const auto& [matrix, rank] : {std::pair{"ffn_gate", 32u}, {"ffn_up", 16u}}) {
    builder.tensor(filled_tensor(tensor_name(matrix, 0, 'a'), {64, rank}, gguf_tensor::f16));
    builder.tensor(filled_tensor(tensor_name(matrix, 0, 'b'), {rank, 96}, gguf_tensor::f16));
  }
  const MemoryFile file(builder.build());
  cpu::CpuBackend backend(1);
  const Adapter exact = load_adapter(GgufFile(file.path()), config, backend);
  const Adapter rounded = load_adapter(GgufFile(file.path()), config, backend, true);
  const auto& [gate, up] = std::pair(&rounded.layers[0].gate, &rounded.layers[0].up);
  CHECK(exact.layers[0].gate.a->dtype() == DType::f16);
  CHECK(gate->a->dtype() == DType::q8_0 && gate->b->dtype() == DType::q8_0);
  CHECK(up->a->dtype() == DType::q8_0 && up->b->dtype() == DType::f16);
  for (int row = 0; row < 96; ++row) {
    float is[32], should[32];
    cpu::PackedWeight::of(*gate->b).dequantize_row(row, is);
    cpu::PackedWeight::of(*exact.layers[0].gate.b).dequantize_row(row, should);
    float largest = 0;
    for (const float x : should) largest = std::max(largest, std::abs(x));
    for (int i = 0; i < 32; ++i) CHECK(std::abs(is[i] - should[i]) <= largest * 0.00403f);
  }
}

TEST(adapter_keys) {
  CHECK_THROWS_WITH(load(tiny_model()),
                    "expected an adapter, whose key 'general.type' is 'adapter'");
  CHECK_THROWS_WITH(load(keys("model")), "whose key 'general.type' is 'adapter'");
  CHECK_THROWS_WITH(load(keys("adapter", "ia3")), "whose key 'adapter.type' is 'lora'");
  CHECK_THROWS_WITH(load(keys("adapter", "lora", "qwen3")),
                    "an adapter of architecture 'qwen3', expected the model's, 'llama'");
  for (const double alpha : {std::nan(""), HUGE_VAL, -HUGE_VAL, 1e300}) {
    GgufBuilder builder = adapter_file();
    builder.key_values.pop_back();
    builder.key("adapter.lora.alpha", gguf_value::f64, bytes_of(alpha));
    CHECK_THROWS_WITH(load(builder), "key 'adapter.lora.alpha' is ");
  }
  GgufBuilder without = adapter_file();
  without.key_values.pop_back();
  CHECK_THROWS_WITH(load(without), "adapter.lora.alpha");
}

TEST(adapter_tensors) {
  CHECK_THROWS_WITH(load(keys().f32("adapter.lora.alpha", 1)), "an adapter without tensors");

  GgufBuilder half = adapter_file();
  half.tensors.pop_back();
  CHECK_THROWS_WITH(load(half), "tensor blk.2.attn_output.weight.lora_b is missing");
  GgufBuilder other_half = adapter_file();
  other_half.tensors.erase(other_half.tensors.begin() + 2);
  CHECK_THROWS_WITH(load(other_half), "tensor blk.2.attn_output.weight.lora_a is missing");

  for (const char* unknown : {"blk.0.attn_qkv.weight.lora_a", "blk.0.attn_q.lora_a",
                              "blk.0.attn_q.weight", "token_embd.weight.lora_a", "blk.00.attn_q"}) {
    GgufBuilder more = adapter_file();
    more.tensor(filled_tensor(unknown, {8, 2}, gguf_tensor::f32));
    CHECK_THROWS_WITH(load(more), format("tensor '{}' is none of an adapter's", unknown));
  }
  GgufBuilder deeper = adapter_file();
  deeper.tensor(part(3, 'a', {6, 2}));
  CHECK_THROWS_WITH(load(deeper), "tensor 'blk.3.attn_output.weight.lora_a' is none of");

  const std::string nan = bytes_of(std::numeric_limits<float>::quiet_NaN());
  GgufBuilder damaged = adapter_file();
  damaged.tensors.back().data.replace(0, nan.size(), nan);
  CHECK_THROWS_WITH(load(damaged),
                    "tensor blk.2.attn_output.weight.lora_b: row 0 holds NaN or infinity");
  GgufBuilder damaged_mask = adapter_file().tensor(mask());
  damaged_mask.tensors.back().data.replace(0, nan.size(), nan);
  CHECK_THROWS_WITH(load(damaged_mask), "tensor sbd.draft.mask_embedding holds NaN or infinity");
}

TEST(adapter_shapes) {
  const auto refused = [](int layer, char side, std::vector<std::uint64_t> dimensions,
                          const std::string& expected) {
    GgufBuilder builder = adapter_file();
    const GgufTensor changed = part(layer, side, std::move(dimensions));
    *std::ranges::find(builder.tensors, changed.name, &GgufTensor::name) = changed;
    CHECK_THROWS_WITH(load(builder), "tensor " + changed.name + ": expected shape " + expected);
  };
  const std::string a = "[rank, 6] with a rank from 1 to 6 by the model, got ";
  refused(0, 'a', {7, 2}, a + "[2, 7]");  // another attention
  refused(0, 'a', {6}, a + "[6]");
  refused(0, 'a', {6, 2, 1}, a + "[1, 2, 6]");
  refused(0, 'a', {6, 7}, a + "[7, 6]");  // a rank beyond the smaller side
  refused(0, 'b', {2, 9}, "[8, 2] by the model and lora_a's rank, got [9, 2]");
  refused(0, 'b', {3, 8}, "[8, 2] by the model and lora_a's rank, got [8, 3]");
  refused(2, 'b', {2, 8, 1}, "[8, 2] by the model and lora_a's rank, got [1, 8, 2]");
}

TEST(adapter_ranks_of_nothing) {
  GgufBuilder none = adapter_file();
  none.tensors[0].dimensions = {6, 0};
  none.tensors[0].data.clear();
  CHECK_THROWS_WITH(load(none), "blk.0.attn_output.weight.lora_a");
  GgufBuilder long_mask = adapter_file().tensor(mask(9));
  CHECK_THROWS_WITH(load(long_mask),
                    "tensor sbd.draft.mask_embedding: expected shape [8] by the model, got [9]");
}

DecoderOptions beside(const GgufBuilder& adapter, bool has_mask, DecoderOptions model = {}) {
  const MemoryFile file(adapter.build());
  return with_adapter(GgufFile(file.path()).metadata(), has_mask, small_config(), std::move(model));
}

GgufBuilder with_prior(const std::vector<float>& prior, const char* way = "") {
  GgufBuilder builder = adapter_file();
  std::string elements;
  for (const float each : prior) elements += bytes_of(each);
  return builder.u32("sbd.block_size", 4)
      .array(std::string("sbd.draft.acceptance") + way, gguf_value::f32, prior.size(), elements);
}

TEST(adapter_makes_a_plain_model_draft) {
  const DecoderOptions plain = beside(adapter_file(), true);
  CHECK(plain.named == (std::vector<std::string>{"sbd_lossless", "ntp"}));
  CHECK(plain.has_adapter && plain.has_mask_embedding && !plain.has_mask_token);
  CHECK_EQ(plain.block.block_size.value_or(0), kBlockSize);
  CHECK_THROWS_WITH(beside(adapter_file(), false),
                    "no decoder of this model can draft with it: decoder \"sbd_lossless\" needs a "
                    "mask token");

  DecoderOptions sbd;
  sbd.named = {"sbd", "sbd_lossless", "ntp"};
  sbd.has_mask_token = true;
  CHECK(beside(adapter_file(), false, sbd).named ==
        (std::vector<std::string>{"sbd_lossless", "sbd", "ntp"}));
  sbd.named = {"nemotron", "nemotron_spec", "ntp"};
  CHECK_EQ(beside(adapter_file(), false, sbd).named.front(), "nemotron_spec");
  sbd.named = {"sdar"};
  sbd.block.prompt_attention = PromptAttention::block_causal;
  CHECK_THROWS_WITH(beside(adapter_file(), true, sbd), "this model's cache is not causal");
}

TEST(adapter_says_how_to_draft) {
  for (const bool known : {true, false}) {
    const GgufBuilder file = with_prior({1.0f, 0.75f, 0.5f, 0.25f}, known ? "" : "_fused");
    const DecoderOptions options = beside(file, true);
    CHECK_EQ(options.block.block_size.value_or(0), 4);
    // Eight drafts' worth; behind its end, and of the other way, what the slot before has.
    const DraftHistory& drafts = *options.drafts;
    const DraftCounts none;
    CHECK_EQ(drafts.agreement(known, none, 1, 0.1), 0.75);
    CHECK_EQ(drafts.agreement(known, none, 3, 0.1), 0.25);
    CHECK_EQ(drafts.agreement(known, none, 4, 0.1), 0.1);
    CHECK_EQ(drafts.agreement(!known, none, 1, 0.1), 0.1);
    DraftCounts one;
    one.record(3, 1, 1, 1.0f);
    CHECK_EQ(drafts.agreement(known, one, 1, 0.1), (1 + 8 * 0.75) / 9);
    CHECK_EQ(drafts.agreement(known, one, 2, 0.1), 8 * 0.5 / 9);
  }

  CHECK_THROWS_WITH(beside(with_prior({1, 1, 1, 1, 1}), true),
                    "key 'sbd.draft.acceptance' has 5 numbers, expected at most 4");
  for (const float bad : {-0.1f, 1.1f, std::nanf("")}) {
    CHECK_THROWS_WITH(beside(with_prior({bad}), true), "expected numbers from 0 to 1");
  }
  CHECK_THROWS_WITH(beside(adapter_file().u32("sbd.block_size", 0), true),
                    "key 'sbd.block_size' is 0, expected 1 to 100");
}

}  // namespace
}  // namespace sbd
