// A draft adapter of random tensors for a tiny model: its file, and the tensors in it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "complete_model.h"
#include "format/model_config.h"
#include "reference.h"

namespace sbd::test {

inline std::uint32_t gguf_type(DType dtype) {
  switch (dtype) {
    case DType::f16: return gguf_tensor::f16;
    case DType::bf16: return gguf_tensor::bf16;
    case DType::q8_0: return gguf_tensor::q8_0;
    default: return gguf_tensor::f32;
  }
}

struct RandomAdapter {
  static constexpr float kAlpha = 6;
  std::map<std::string, StoredTensor> tensors;

  // Every matrix of every layer but one, in ranks that differ where the type allows.
  RandomAdapter(const ModelConfig& config, DType dtype) {
    Random random(17);
    architecture_ = config.architecture;
    const int hidden = config.hidden_size, inner = config.intermediate_size;
    const int q = config.num_attention_heads * config.head_dim;
    const int kv = config.num_key_value_heads * config.head_dim;
    const struct {
      const char* name;
      int out, in, rank;
    } places[] = {{"attn_q", q, hidden, 4},       {"attn_k", kv, hidden, 7},
                  {"attn_v", kv, hidden, 32},     {"attn_output", hidden, q, 8},
                  {"ffn_gate", inner, hidden, 5}, {"ffn_up", inner, hidden, 33},
                  {"ffn_down", hidden, inner, 16}};
    for (int i = 0; i < config.num_hidden_layers; ++i) {
      for (const auto& [place, out, in, wanted] : places) {
        const std::string name = "blk." + std::to_string(i) + "." + place + ".weight.lora_";
        if (name.starts_with("blk.1.attn_v")) continue;
        const int rank = values_per_block(dtype) > 1 ? 32 : wanted;
        tensors[name + 'a'] = random_matrix(name + 'a', dtype, rank, in, 0.1, random);
        tensors[name + 'b'] = random_matrix(name + 'b', dtype, out, rank, 0.1, random);
      }
    }
    const std::string mask = "sbd.draft.mask_embedding";
    tensors[mask] = f32_tensor(mask, {hidden}, random.floats(hidden, -0.5, 0.5));
  }

  GgufBuilder builder() const {
    GgufBuilder builder;
    builder.text("general.type", "adapter").text("adapter.type", "lora");
    builder.text("general.architecture", architecture_).f32("adapter.lora.alpha", kAlpha);
    for (const auto& [name, tensor] : tensors) {
      const std::vector<std::uint64_t> dimensions(tensor.shape.rbegin(), tensor.shape.rend());
      const auto* data = reinterpret_cast<const char*>(tensor.bytes.data());
      builder.tensor({name, dimensions, gguf_type(tensor.dtype), {data, tensor.bytes.size()}});
    }
    return builder;
  }

 private:
  std::string architecture_;
};

}  // namespace sbd::test
