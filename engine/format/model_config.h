// What a model is: shapes and architecture flags.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/types.h"
#include "format/gguf.h"
#include "format/metadata.h"

namespace sbd {

// Sections of layers in Direct Multi-Token Decoding: encoding, thinking, decoding.
inline constexpr int kLayerSections = 3;

// YaRN (arXiv 2309.00071): RoPE's frequencies that turn seldom within the length that the model was
// first trained for are divided by a factor.
struct Yarn {
  double factor = 1;
  int original_length = 0;
  double beta_fast = 32;  // turns within that length: about these stay as they are
  double beta_slow = 1;   // about these are divided, with a ramp between
};

// Names are those of HF's config.json. Architectures differ in flags only.
struct ModelConfig {
  std::string architecture;  // "llama", "qwen2", ...: GGUF's name
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
  std::optional<Yarn> yarn;
  double rope_attention_factor = 1;  // RoPE multiplies queries and keys by it, as with YaRN
  // Where the scale is not 0, queries grow with their position, after RoPE:
  // q *= 1 + scale * ln(1 + floor(position / length))
  double attention_temperature_scale = 0;
  int attention_temperature_length = 0;
  bool rope_interleaved = false;  // pairs (2i, 2i+1), GGUF's llama; else (i, i + head_dim/2)
  bool attention_bias = false;    // q, k, v must have biases; else they may
  bool qk_norm = false;           // RMSNorm of each q and k head before RoPE

  std::array<int, kLayerSections>
      layer_sections{};  // layers in each; without such a cut all in the last

  std::vector<TokenId> eos_token_ids;
  std::optional<TokenId> mask_token_id;
};

// Checks every value's type and range, and their agreement; errors name the key. Where no key says
// how large the vocabulary is, that is the embedding's rows among `tensors`, or the tokenizer's
// tokens.
ModelConfig read_model_config(const Metadata& metadata, std::span<const FileTensor> tensors = {});

}  // namespace sbd
