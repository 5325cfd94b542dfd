#include "format/model_config.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "format/key_reader.h"

namespace sbd {
namespace {

struct Architecture {
  std::string_view name;
  bool rope_interleaved;
  bool attention_bias;
  bool qk_norm;
};

constexpr Architecture kArchitectures[] = {
    {"llama", true, false, false}, {"qwen2", false, true, false}, {"qwen3", false, false, true},
    {"llada", true, false, false}, {"dream", false, true, false}, {"mistral3", true, false, false},
};

// Several times what the largest models have, and small enough that the cache's size in bytes,
// 2 * layers * context * (kv heads * head_dim) * 4 <= 2^60, and every row fit their integers.
constexpr int kMaxLayers = 1 << 12;
constexpr int kMaxHidden = 1 << 18;  // also of heads * head_dim
constexpr int kMaxIntermediate = 1 << 20;
constexpr int kMaxVocab = 1 << 22;
constexpr int kMaxContext = 1 << 27;
constexpr std::size_t kMaxEosTokens = 1 << 8;  // each one is looked up for every new token

// Operations that a file may ask for and the forward does not have: the keys, and the value with
// which they do nothing.
struct MissingOperation {
  std::string_view key;
  double neutral;
};

constexpr MissingOperation kMissingOperations[] = {
    {"expert_count", 0},
    {"logit_scale", 1},
    {"residual_scale", 1},
    {"embedding_scale", 1},
    {"attention.scale", 0},
    {"attention.clamp_kqv", 0},
    {"attention.max_alibi_bias", 0},
    {"attn_logit_softcapping", 0},
    {"final_logit_softcapping", 0},
    {"rope.scaling.yarn_ext_factor", 1},
    {"rope.scaling.yarn_attn_factor", 1},
};

constexpr std::string_view kTokens = "tokenizer.ggml.tokens";

// Tokens that end the text in llama.cpp, by name, whatever a file's keys say.
constexpr std::string_view kEndNames[] = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<eos>",
    "<end_of_utterance>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
    "<｜end▁of▁sentence｜>",
};

// Where a vocabulary has both of the last two, the first ends a part of the text, not the text.
constexpr std::string_view kNoEnds[][3] = {
    {"<|end|>", "<|return|>", "<|call|>"},
    {"<|end|>", "<|calls|>", "<|flush|>"},
    {"</s>", "<|tool_response>", "<|tool_response>"},
};

const Architecture& find_architecture(const Metadata& metadata) {
  const KeyReader reader(metadata, "general.");
  const std::string& name = metadata.string("general.architecture");
  std::vector<std::string_view> names;
  for (const Architecture& architecture : kArchitectures) {
    names.push_back(architecture.name);
  }
  reader.check_one_of(name, "architecture", names);
  return *std::ranges::find(kArchitectures, name, &Architecture::name);
}

void refuse_missing_operations(const KeyReader& reader) {
  constexpr std::string_view kMend = "the engine lacks the operation: give another model";
  for (const MissingOperation& operation : kMissingOperations) {
    const double value = reader.number(operation.key, operation.neutral);
    reader.check(value == operation.neutral, operation.key, value, operation.neutral, kMend);
  }
  reader.check(reader.boolean("attention.causal", true), "attention.causal", "false", "true",
               kMend);
}

void read_heads(const KeyReader& reader, ModelConfig& config) {
  const int heads = reader.integer("attention.head_count", 1, kMaxHidden);
  const int kv_heads = reader.integer("attention.head_count_kv", 1, kMaxHidden, heads);
  reader.check(heads % kv_heads == 0, "attention.head_count_kv", kv_heads,
               format("a divisor of the {} heads", heads));
  reader.check(reader.has("attention.key_length") || config.hidden_size % heads == 0,
               "attention.head_count", heads,
               format("a divisor of embedding_length {}", config.hidden_size));

  const int most = kMaxHidden / heads;
  const int head_dim = reader.integer("attention.key_length", 1, most, config.hidden_size / heads);
  reader.check(head_dim % 2 == 0, "attention.key_length", head_dim, "an even number");
  for (const std::string_view same : {"attention.value_length", "rope.dimension_count"}) {
    const int size = reader.integer(same, 1, most, head_dim);
    reader.check(size == head_dim, same, size, format("{} as the head's size", head_dim));
  }
  config.num_attention_heads = heads;
  config.num_key_value_heads = kv_heads;
  config.head_dim = head_dim;
}

void read_vocab_size(const KeyReader& reader, std::span<const FileTensor> tensors,
                     ModelConfig& config) {
  const Metadata& metadata = reader.metadata();
  const std::size_t tokens = metadata.contains(kTokens) ? metadata.strings(kTokens).size() : 0;
  SBD_CHECK(tokens <= kMaxVocab,
            "{}: key '{}' has {} tokens, expected at most {}; convert the checkpoint again",
            metadata.source(), kTokens, tokens, kMaxVocab);
  const int count = static_cast<int>(tokens);
  const auto embedding = std::ranges::find(tensors, "token_embd.weight", &FileTensor::name);
  const std::int64_t rows = embedding == tensors.end() ? 0 : embedding->shape.front();
  const int missing = static_cast<int>(std::clamp<std::int64_t>(rows, count, kMaxVocab));
  config.vocab_size = missing == 0 ? reader.integer("vocab_size", 1, kMaxVocab)
                                   : reader.integer("vocab_size", 1, kMaxVocab, missing);
  reader.check(count <= config.vocab_size, "vocab_size", config.vocab_size,
               format("at least the tokenizer's {} tokens", count));
}

double read_positive(const KeyReader& reader, std::string_view key, double missing) {
  const double value = reader.number(key, missing);
  reader.check(value > 0 && std::isfinite(value), key, value, "a finite number above 0");
  return value;
}

// The keys and what a missing one stands for are llama.cpp's, as is the attention factor: what
// YaRN's paper gives for its factor, times a number of the file's own.
void read_yarn(const KeyReader& reader, ModelConfig& config) {
  constexpr std::string_view kFactor = "rope.scaling.factor";
  constexpr std::string_view kFast = "rope.scaling.yarn_beta_fast";
  Yarn yarn;
  yarn.factor = read_positive(reader, kFactor, 1);
  yarn.original_length = reader.integer("rope.scaling.original_context_length", 1, INT_MAX,
                                        config.max_position_embeddings);
  yarn.beta_fast = read_positive(reader, kFast, yarn.beta_fast);
  yarn.beta_slow = read_positive(reader, "rope.scaling.yarn_beta_slow", yarn.beta_slow);
  reader.check(yarn.beta_fast > yarn.beta_slow, kFast, yarn.beta_fast,
               format("more than yarn_beta_slow {}", yarn.beta_slow));
  reader.check(config.rope_theta > 1, "rope.freq_base", config.rope_theta,
               "more than 1, as YaRN needs it");
  config.yarn = yarn;

  const auto grown = [&](double scale) {
    return 1 + 0.1 * scale * std::log(std::max(yarn.factor, 1.0));
  };
  constexpr std::string_view kAllDimensions = "rope.scaling.yarn_log_multiplier";
  const double all_dimensions = reader.number(kAllDimensions, 0);
  reader.check(all_dimensions >= 0 && std::isfinite(all_dimensions), kAllDimensions, all_dimensions,
               "a finite number of at least 0");
  config.rope_attention_factor *= grown(1) / grown(all_dimensions);
}

void read_rope(const KeyReader& reader, ModelConfig& config) {
  config.rope_theta = reader.number("rope.freq_base", 10000);
  reader.check(config.rope_theta >= 1 && std::isfinite(config.rope_theta), "rope.freq_base",
               config.rope_theta, "a finite number of at least 1");
  config.rope_attention_factor = read_positive(reader, "rope.scaling.attn_factor", 1);

  // A factor without a type means linear scaling: old files have it alone, under an older name.
  constexpr std::string_view kType = "rope.scaling.type";
  const std::string type = reader.string(kType, "linear");
  reader.check_one_of(type, kType,
                      std::initializer_list<std::string_view>{"none", "linear", "yarn"});
  if (type == "none") return;
  const std::string_view factor =
      reader.has("rope.scale_linear") ? "rope.scale_linear" : "rope.scaling.factor";
  reader.check(reader.has(factor) || !reader.has(kType), kType, quote(type),
               format("'none', or the key '{}' too", reader.key(factor)));
  if (type == "yarn") {
    read_yarn(reader, config);
  } else {
    config.rope_linear_factor = read_positive(reader, factor, 1);
  }
}

void read_attention_temperature(const KeyReader& reader, ModelConfig& config) {
  constexpr std::string_view kScale = "attention.temperature_scale";
  const double scale = reader.number(kScale, 0);
  reader.check(scale >= 0 && std::isfinite(scale), kScale, scale, "a finite number of at least 0");
  if (scale == 0) return;
  config.attention_temperature_scale = scale;
  config.attention_temperature_length = reader.integer("attention.temperature_length", 1, INT_MAX);
}

// The key of the mask token; empty where there is none.
std::string_view mask_token_key(const Metadata& metadata) {
  for (const std::string_view key : {"sbd.mask_token_id", "tokenizer.ggml.mask_token_id"}) {
    if (metadata.contains(key)) return key;
  }
  return {};
}

// Ids of the names that end a text, in the vocabulary's order.
std::vector<TokenId> ends_by_name(const std::vector<std::string>& tokens) {
  std::map<std::string_view, TokenId> found;
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    if (std::ranges::find(kEndNames, tokens[id]) != std::end(kEndNames)) {
      found.emplace(tokens[id], static_cast<TokenId>(id));
    }
  }
  for (const auto& [name, beside, too] : kNoEnds) {
    if (found.contains(beside) && found.contains(too)) found.erase(name);
  }
  std::vector<TokenId> ids;
  for (const auto& [name, id] : found) ids.push_back(id);
  std::ranges::sort(ids);
  return ids;
}

void read_eos_token_ids(const Metadata& metadata, ModelConfig& config) {
  const std::int64_t last = config.vocab_size - 1;
  const auto add = [&](std::string_view key, std::int64_t id) {
    SBD_CHECK(id >= 0 && id <= last,
              "{}: key '{}' has token id {}, expected 0 to {}; convert the checkpoint again",
              metadata.source(), key, id, last);
    auto& ids = config.eos_token_ids;
    const auto token = static_cast<TokenId>(id);
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) {
      SBD_CHECK(ids.size() < kMaxEosTokens,
                "{}: key '{}' has more than {} token ids, expected at most that many; convert the "
                "checkpoint again",
                metadata.source(), key, kMaxEosTokens);
      ids.push_back(token);
    }
  };
  constexpr std::string_view kOurs = "sbd.eos_token_ids";
  if (metadata.contains(kOurs)) {
    for (const std::int64_t id : metadata.integers(kOurs)) {
      add(kOurs, id);
    }
    return;
  }
  // The end of the text, of a turn and of a message.
  for (const std::string_view key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                     "tokenizer.ggml.eom_token_id"}) {
    if (metadata.contains(key)) {
      add(key, metadata.integer(key, INT64_MIN, INT64_MAX));
    }
  }
  // A file from elsewhere may leave it to the names, of which one may be its mask token.
  if (!metadata.contains(kTokens) || metadata.contains("tokenizer.huggingface.json")) return;
  const std::string_view mask = mask_token_key(metadata);
  for (const TokenId id : ends_by_name(metadata.strings(kTokens))) {
    if (mask.empty() || metadata.integer(mask, 0, last) != id) add(kTokens, id);
  }
}

void read_mask_token_id(const Metadata& metadata, ModelConfig& config) {
  const std::string_view key = mask_token_key(metadata);
  if (key.empty()) return;
  const auto mask = static_cast<TokenId>(metadata.integer(key, 0, config.vocab_size - 1));
  const auto& eos = config.eos_token_ids;
  SBD_CHECK(std::find(eos.begin(), eos.end(), mask) == eos.end(),
            "{}: key '{}' is {}, expected a token that does not end the text; convert the "
            "checkpoint again with another --mask-token",
            metadata.source(), key, mask);
  config.mask_token_id = mask;
}

// Direct Multi-Token Decoding's cut of the layers.
void read_layer_sections(const Metadata& metadata, ModelConfig& config) {
  constexpr std::string_view kLayers = "sbd.dmtd.layers";
  const int all = config.num_hidden_layers;
  config.layer_sections = {0, 0, all};
  if (!metadata.contains(kLayers)) return;
  const auto& sections = metadata.integers(kLayers);
  bool fits = sections.size() == kLayerSections;
  std::int64_t sum = 0;
  for (std::size_t i = 0; fits && i < sections.size(); ++i) {
    fits = sections[i] >= (i == 0 ? 0 : 1) && sections[i] <= all;  // encoding may be empty
    sum += sections[i];
  }
  SBD_CHECK(fits && sum == all,
            "{}: key '{}' is {}, expected encoding (0 or more), thinking and decoding layers that "
            "add up to {}; convert the checkpoint again",
            metadata.source(), kLayers, joined(sections), all);
  std::ranges::copy(sections, config.layer_sections.begin());
}

void refuse_a_part(const Metadata& metadata) {
  constexpr std::string_view kCount = "split.count";
  const std::int64_t parts = metadata.contains(kCount) ? metadata.integer(kCount, 0, INT_MAX) : 0;
  SBD_CHECK(parts <= 1,
            "{}: key '{}' is {}, expected a whole model; join the parts with: "
            "llama-gguf-split --merge FIRST-PART model.bin",
            metadata.source(), kCount, parts);
}

}  // namespace

ModelConfig read_model_config(const Metadata& metadata, std::span<const FileTensor> tensors) {
  refuse_a_part(metadata);
  const Architecture& architecture = find_architecture(metadata);
  ModelConfig config;
  config.architecture = architecture.name;
  config.rope_interleaved = architecture.rope_interleaved;
  config.attention_bias = architecture.attention_bias;
  config.qk_norm = architecture.qk_norm;

  const KeyReader reader(metadata, config.architecture + ".");
  refuse_missing_operations(reader);
  config.num_hidden_layers = reader.integer("block_count", 1, kMaxLayers);
  config.hidden_size = reader.integer("embedding_length", 1, kMaxHidden);
  config.intermediate_size = reader.integer("feed_forward_length", 1, kMaxIntermediate);
  config.max_position_embeddings = reader.integer("context_length", 1, kMaxContext);
  config.sliding_window = reader.integer("attention.sliding_window", 0, INT_MAX, 0);

  constexpr std::string_view kEps = "attention.layer_norm_rms_epsilon";
  const double eps = metadata.number(reader.key(kEps));
  reader.check(eps >= 1e-12 && eps < 1, kEps, eps, "1e-12 to 1");
  config.rms_norm_eps = static_cast<float>(eps);

  read_heads(reader, config);
  read_vocab_size(reader, tensors, config);
  read_rope(reader, config);
  read_attention_temperature(reader, config);
  read_eos_token_ids(metadata, config);
  read_mask_token_id(metadata, config);
  read_layer_sections(metadata, config);
  return config;
}

}  // namespace sbd
