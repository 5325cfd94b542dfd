// A tiny model of random tensors in memory.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "core/types.h"
#include "format/model_config.h"
#include "model/weights.h"
#include "reference.h"

namespace sbd::test {

using Tokens = std::vector<TokenId>;

inline constexpr int kVocab = 75;

// Rows of every matrix have whole blocks of the weights' type.
inline ModelConfig tiny_config(const std::string& architecture, DType dtype = DType::f32) {
  const bool long_rows = values_per_block(dtype) > kGroupSize;
  ModelConfig config;
  config.architecture = architecture;
  config.num_hidden_layers = 2;
  config.hidden_size = long_rows ? 256 : 64;
  config.intermediate_size = long_rows ? 512 : 96;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = long_rows ? 64 : 16;
  config.vocab_size = kVocab;
  config.max_position_embeddings = 4096;
  config.rms_norm_eps = 1e-5f;
  config.rope_theta = 10000;
  config.rope_interleaved = architecture == "llama";
  config.attention_bias = architecture == "qwen2";
  config.qk_norm = architecture == "qwen3";
  return config;
}

// Random tensors in memory, every one away from the value that would hide its operation.
class MemoryTensors : public TensorSource {
 public:
  // more_biases: on all four attention projections, as some Llama-shaped models have.
  MemoryTensors(const ModelConfig& config, DType dtype, bool tied, bool rope_freqs = false,
                bool more_biases = false)
      : random_(std::hash<std::string>{}(config.architecture)) {
    const int hidden = config.hidden_size;
    const int q = config.num_attention_heads * config.head_dim;
    const int kv = config.num_key_value_heads * config.head_dim;
    const auto matrix = [&](const std::string& name, int rows, int cols, double size) {
      tensors[name] = random_matrix(name, dtype, rows, cols, size, random_);
    };
    const auto vector = [&](const std::string& name, int n, double low, double high) {
      tensors[name] = f32_tensor(name, {n}, random_.floats(static_cast<std::size_t>(n), low, high));
    };
    const double size = 2 / std::sqrt(hidden);
    matrix("token_embd.weight", config.vocab_size, hidden, 0.5);
    if (!tied) matrix("output.weight", config.vocab_size, hidden, 0.5);
    vector("output_norm.weight", hidden, 0.5, 1.5);
    if (rope_freqs) vector("rope_freqs.weight", config.head_dim / 2, 1, 4);
    for (int i = 0; i < config.num_hidden_layers; ++i) {
      const std::string layer = "blk." + std::to_string(i) + ".";
      vector(layer + "attn_norm.weight", hidden, 0.5, 1.5);
      vector(layer + "ffn_norm.weight", hidden, 0.5, 1.5);
      matrix(layer + "attn_q.weight", q, hidden, size);
      matrix(layer + "attn_k.weight", kv, hidden, size);
      matrix(layer + "attn_v.weight", kv, hidden, size);
      matrix(layer + "attn_output.weight", hidden, q, size);
      matrix(layer + "ffn_gate.weight", config.intermediate_size, hidden, size);
      matrix(layer + "ffn_up.weight", config.intermediate_size, hidden, size);
      matrix(layer + "ffn_down.weight", hidden, config.intermediate_size, size);
      if (config.attention_bias || more_biases) {
        vector(layer + "attn_q.bias", q, -0.5, 0.5);
        vector(layer + "attn_k.bias", kv, -0.5, 0.5);
        vector(layer + "attn_v.bias", kv, -0.5, 0.5);
      }
      if (more_biases) vector(layer + "attn_output.bias", hidden, -0.5, 0.5);
      if (config.qk_norm) {
        vector(layer + "attn_q_norm.weight", config.head_dim, 0.5, 1.5);
        vector(layer + "attn_k_norm.weight", config.head_dim, 0.5, 1.5);
      }
    }
  }

  bool has(const std::string& name) override { return tensors.contains(name); }
  Tensor get(const std::string& name, const std::vector<std::int64_t>& shape) override {
    CHECK_IN(name, tensors.contains(name) && tensors.at(name).shape == shape);
    return tensors.at(name).view();
  }

  std::map<std::string, StoredTensor> tensors;

 private:
  Random random_;
};

}  // namespace sbd::test
