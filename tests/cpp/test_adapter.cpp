// LoRA adapter files: what is read, and each wrong one's own line.
#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "complete_model.h"

namespace sbd {
namespace {

using namespace test;

ModelConfig small_config() {
  ModelConfig config;
  config.architecture = "llama";
  config.num_hidden_layers = 3;
  config.hidden_size = 8;
  config.num_attention_heads = 2;
  config.head_dim = 3;  // 6 values are attended
  return config;
}

GgufTensor part(int layer, char side, std::vector<std::uint64_t> dimensions) {
  return filled_tensor(format("blk.{}.attn_output.weight.lora_{}", layer, side),
                       std::move(dimensions), gguf_tensor::f32);
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
  CHECK_EQ(adapter.rank, 2);
  CHECK_EQ(adapter.scale, 2.0f);
  CHECK_EQ(adapter.layers.size(), 3);
  for (int i = 0; i < 3; ++i) {
    const Adapter::Layer& layer = adapter.layers[static_cast<std::size_t>(i)];
    CHECK_EQ(layer.a != nullptr, i != 1);
    CHECK_EQ(layer.b != nullptr, i != 1);
  }
  CHECK_EQ(load(adapter_file(-1)).scale, -0.5f);
}

TEST(adapter_keys) {
  CHECK_THROWS_WITH(load(tiny_model()),
                    "expected an adapter, whose key 'general.type' is 'adapter'");
  CHECK_THROWS_WITH(load(keys("model")), "whose key 'general.type' is 'adapter'");
  CHECK_THROWS_WITH(load(keys("adapter", "ia3")), "whose key 'adapter.type' is 'lora'");
  CHECK_THROWS_WITH(load(keys("adapter", "lora", "qwen3")),
                    "whose key 'general.architecture' is 'llama'");
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
  CHECK_THROWS_WITH(load(keys()),
                    "expected tensors such as blk.0.attn_output.weight.lora_a, found none");

  GgufBuilder half = adapter_file();
  half.tensors.pop_back();
  CHECK_THROWS_WITH(load(half), "tensor blk.2.attn_output.weight.lora_b is missing");
  GgufBuilder other_half = adapter_file();
  other_half.tensors.erase(other_half.tensors.begin() + 2);
  CHECK_THROWS_WITH(load(other_half), "tensor 'blk.2.attn_output.weight.lora_b' belongs to");

  GgufBuilder more = adapter_file();
  more.tensor(filled_tensor("blk.0.attn_q.weight.lora_a", {8, 2}, gguf_tensor::f32));
  CHECK_THROWS_WITH(load(more), "tensor 'blk.0.attn_q.weight.lora_a' belongs to");
  GgufBuilder deeper = adapter_file();
  deeper.tensor(part(3, 'a', {6, 2}));
  CHECK_THROWS_WITH(load(deeper), "tensor 'blk.3.attn_output.weight.lora_a' belongs to");

  GgufBuilder damaged = adapter_file();
  const std::string nan = bytes_of(std::numeric_limits<float>::quiet_NaN());
  damaged.tensors.back().data.replace(0, nan.size(), nan);
  CHECK_THROWS_WITH(load(damaged),
                    "tensor blk.2.attn_output.weight.lora_b: row 0 holds NaN or infinity");
}

TEST(adapter_shapes) {
  const auto refused = [](int layer, char side, std::vector<std::uint64_t> dimensions,
                          const std::string& expected) {
    GgufBuilder builder = adapter_file();
    const GgufTensor changed = part(layer, side, std::move(dimensions));
    *std::ranges::find(builder.tensors, changed.name, &GgufTensor::name) = changed;
    CHECK_THROWS_WITH(load(builder), "tensor " + changed.name + ": expected shape " + expected);
  };
  refused(0, 'a', {7, 2}, "[2, 6] by the metadata, got [2, 7]");  // another attention
  refused(0, 'a', {6}, "[6, 6] by the metadata, got [6]");
  refused(0, 'a', {6, 2, 1}, "[1, 6] by the metadata, got [1, 2, 6]");
  refused(0, 'a', {6, 9}, "[8, 6] by the metadata, got [9, 6]");  // a rank beyond the model's size
  refused(0, 'b', {2, 9}, "[8, 2] by the metadata, got [9, 2]");
  refused(0, 'b', {3, 8}, "[8, 2] by the metadata, got [8, 3]");
  refused(2, 'a', {6, 3}, "[2, 6] by the metadata, got [3, 6]");  // another rank than layer 0's
}

}  // namespace
}  // namespace sbd
