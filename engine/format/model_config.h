// What a model is (shapes and architecture flags) and how its file wants to be decoded.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/types.h"
#include "format/metadata.h"

namespace sbd {

// Names are those of HF's config.json. Architectures differ in flags only.
struct ModelConfig {
  std::string architecture;  // "llama", "qwen2", "qwen3"
  int num_hidden_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  int sliding_window = 0;  // 0: none
  float rms_norm_eps = 0;
  double rope_theta = 0;
  double rope_linear_factor = 1;  // positions are divided by it
  bool rope_interleaved = false;  // pairs (2i, 2i+1), GGUF's llama; else (i, i + head_dim/2)
  bool attention_bias = false;    // q, k, v have biases
  bool qk_norm = false;           // RMSNorm of each q and k head before RoPE

  std::vector<TokenId> eos_token_ids;
  std::optional<TokenId> mask_token_id;
};

// Defaults of the decoders, the file's `sbd.*` keys.
struct DecodeDefaults {
  std::vector<std::string> decoders = {"ntp"};  // what the file can run, `auto` takes the first
  int block_size = 16;
  std::string unmask = "entropy_bounded";
  std::string proxy = "entropy";
  float gamma = 0.35f;
  float factor = 1.0f;
  float confidence_threshold = 0.9f;
  int top_n = 1;
};

// Both check every value's type and range, and their agreement; errors name the key.
ModelConfig read_model_config(const Metadata& metadata);
DecodeDefaults read_decode_defaults(const Metadata& metadata, const ModelConfig& config);

}  // namespace sbd
