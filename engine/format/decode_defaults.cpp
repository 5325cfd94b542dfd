// The `sbd.*` keys: how a model file wants to be decoded.
#include <algorithm>
#include <climits>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string_view>

#include "core/error.h"
#include "format/key_reader.h"
#include "format/model_config.h"
#include "format/text.h"

namespace sbd {
namespace {

using Names = std::initializer_list<std::string_view>;

// Sixteen times the largest in use. A block is one forward: without a bound, a file of a few bytes
// with a huge context could ask for one that takes all memory and never ends.
constexpr int kMostBlockSize = 1 << 10;

// A key that is not known here is refused: text decoded without what it asks for would be wrong.
void refuse_unknown_keys(const Metadata& metadata) {
  constexpr std::string_view kRead[] = {"mask_token_id",
                                        "eos_token_ids",
                                        "decoders",
                                        "block_size",
                                        "sub_block_size",
                                        "steps",
                                        "schedule",
                                        "unmask",
                                        "proxy",
                                        "gamma",
                                        "factor",
                                        "threshold",
                                        "top_n",
                                        "logit_shift",
                                        "seed_slot",
                                        "block_origin",
                                        "prompt_attention",
                                        "commit_attention",
                                        "dmtd.layers",
                                        "dmtd.horizon",
                                        "dmtd.prompt_rule",
                                        "d2f.block_add_threshold",
                                        "d2f.decoded_token_threshold",
                                        "d2f.skip_threshold"};
  for (const auto& [key, value] : metadata.entries()) {
    if (!key.starts_with("sbd.")) continue;
    const std::string_view name = std::string_view(key).substr(4);
    SBD_CHECK(std::find(std::begin(kRead), std::end(kRead), name) != std::end(kRead),
              "{}: key {} is one this engine does not know; this engine cannot decode such a model "
              "yet",
              metadata.source(), quote(key));
  }
}

std::string read_name(const KeyReader& reader, std::string_view key, std::string_view missing,
                      Names names) {
  const std::string name = reader.string(key, missing);
  if (reader.has(key)) reader.check_one_of(name, key, names);
  return name;
}

float read_share(const KeyReader& reader, std::string_view key, float missing) {
  const double value = reader.number(key, missing);
  reader.check(value >= 0 && value <= 1, key, value, "0 to 1");
  return static_cast<float>(value);
}

std::vector<std::string> read_decoders(const KeyReader& reader, const ModelConfig& config) {
  constexpr std::string_view kDecoders = "decoders";
  if (!reader.has(kDecoders)) {
    const bool sbd = reader.has("block_size") && config.mask_token_id.has_value();
    return sbd ? std::vector<std::string>{"sbd", "ntp"} : std::vector<std::string>{"ntp"};
  }
  const auto& decoders = reader.metadata().strings(reader.key(kDecoders));
  reader.check(!decoders.empty(), kDecoders, "an empty array", "at least one name");
  for (auto decoder = decoders.begin(); decoder != decoders.end(); ++decoder) {
    reader.check_one_of(*decoder, kDecoders, kDecoderNames);
    reader.check(std::find(decoders.begin(), decoder, *decoder) == decoder, kDecoders,
                 format("{} twice", quote(*decoder)), "each name once");
    const bool masks = *decoder != "ntp" && *decoder != "dmtd";
    reader.check(!masks || config.mask_token_id.has_value(), kDecoders, quote(*decoder),
                 "'ntp', as there is no mask token",
                 "convert the checkpoint again with --mask-token");
    reader.check(*decoder != "dmtd" || reader.has("dmtd.layers"), kDecoders, "'dmtd'",
                 "'ntp', as there is no cut of the layers",
                 "convert the checkpoint again with --set sbd.dmtd.layers=E,T,D");
  }
  return decoders;
}

// What says how a block is read and cached. Some options need others: the decoders say which.
void read_block(const KeyReader& reader, const ModelConfig& config, DecodeDefaults& defaults) {
  defaults.prompt_attention = read_name(reader, "prompt_attention", defaults.prompt_attention,
                                        Names{"causal", "bidirectional", "block_causal", "full"});
  defaults.commit_attention = read_name(reader, "commit_attention", defaults.commit_attention,
                                        Names{"causal", "block", "none"});
  defaults.block_origin =
      read_name(reader, "block_origin", defaults.block_origin, Names{"prompt", "absolute"});
  defaults.logit_shift = reader.integer("logit_shift", 0, 1, defaults.logit_shift);
  defaults.seed_slot = reader.integer("seed_slot", 0, 1, defaults.seed_slot) == 1;

  const int most = std::min(config.max_position_embeddings, kMostBlockSize);
  const int missing = defaults.prompt_attention == "full" ? 0 : defaults.block_size;
  defaults.block_size = reader.integer("block_size", 1, most, missing);
  defaults.sub_block_size = reader.integer("sub_block_size", 1, most, defaults.sub_block_size);
  reader.check(defaults.sub_block_size == 0 || defaults.block_size % defaults.sub_block_size == 0,
               "sub_block_size", defaults.sub_block_size,
               format("a divisor of block_size {}", defaults.block_size));
  defaults.steps = reader.integer("steps", 1, INT_MAX, defaults.steps);
  defaults.schedule = read_name(reader, "schedule", defaults.schedule, Names{"even", "linear"});
}

void read_unmasking(const KeyReader& reader, DecodeDefaults& defaults) {
  defaults.unmask = read_name(reader, "unmask", defaults.unmask,
                              Names{"entropy_bounded", "factor", "confidence", "top_n"});
  defaults.proxy = read_name(reader, "proxy", defaults.proxy,
                             Names{"entropy", "confidence", "margin", "position"});

  constexpr double kLargest = std::numeric_limits<float>::max();
  const double gamma = reader.number("gamma", defaults.gamma);
  reader.check(gamma >= 0, "gamma", gamma, "0 or more nats, or infinity",
               "convert the checkpoint again with another --gamma");
  defaults.gamma =
      gamma > kLargest ? std::numeric_limits<float>::infinity() : static_cast<float>(gamma);
  const double factor = reader.number("factor", defaults.factor);
  reader.check(factor > 0 && factor <= kLargest, "factor", factor, "a finite number above 0");
  defaults.factor = static_cast<float>(factor);
  defaults.confidence_threshold = read_share(reader, "threshold", defaults.confidence_threshold);
  defaults.top_n = reader.integer("top_n", 1, INT_MAX, defaults.top_n);
}

}  // namespace

DecodeDefaults read_decode_defaults(const Metadata& metadata, const ModelConfig& config) {
  const KeyReader reader(metadata, "sbd.");
  refuse_unknown_keys(metadata);

  DecodeDefaults defaults;
  defaults.decoders = read_decoders(reader, config);
  read_block(reader, config, defaults);
  read_unmasking(reader, defaults);
  defaults.horizon = reader.integer("dmtd.horizon", 1, INT_MAX, defaults.horizon);
  defaults.prompt_rule = read_name(reader, "dmtd.prompt_rule", defaults.prompt_rule,
                                   Names{"all_heads", "plain", "train"});
  defaults.block_add_threshold =
      read_share(reader, "d2f.block_add_threshold", defaults.block_add_threshold);
  defaults.decoded_token_threshold =
      read_share(reader, "d2f.decoded_token_threshold", defaults.decoded_token_threshold);
  defaults.skip_threshold = read_share(reader, "d2f.skip_threshold", defaults.skip_threshold);
  return defaults;
}

}  // namespace sbd
