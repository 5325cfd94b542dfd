#include "decode_defaults.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <string_view>

#include "core/error.h"
#include "format/key_reader.h"
#include "format/text.h"

namespace sbd {
namespace {

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
  const std::vector<std::string> known = decoder_names();
  for (auto decoder = decoders.begin(); decoder != decoders.end(); ++decoder) {
    reader.check_one_of(*decoder, kDecoders, known);
    reader.check(std::find(decoders.begin(), decoder, *decoder) == decoder, kDecoders,
                 format("{} twice", quote(*decoder)), "each name once");
  }
  return decoders;
}

// What says how a block is read and cached. Some options need others: the decoders say which.
void read_block(const KeyReader& reader, const ModelConfig& config, BlockMethod& block) {
  block.prompt_attention =
      reader.named("prompt_attention", kPromptAttentions, block.prompt_attention);
  block.commit_attention =
      reader.named("commit_attention", kCommitAttentions, block.commit_attention);
  block.absolute_blocks = reader.named("block_origin", kBlockOrigins, block.absolute_blocks);
  block.logit_shift = reader.integer("logit_shift", 0, 1, block.logit_shift);
  block.seed_slot = reader.integer("seed_slot", 0, 1, block.seed_slot) == 1;

  const int most = std::min(config.max_position_embeddings, kMostBlockSize);
  if (reader.has("block_size")) {
    block.block_size = reader.integer("block_size", 1, most);
  } else if (block.prompt_attention == PromptAttention::full) {
    block.block_size.reset();
  } else {
    block.block_size = std::min(kBlockSize, most);
  }
  if (reader.has("sub_block_size")) {
    block.sub_block_size = reader.integer("sub_block_size", 1, most);
    reader.check(block.block_size.value_or(0) % *block.sub_block_size == 0, "sub_block_size",
                 *block.sub_block_size,
                 format("a divisor of block_size {}", block.block_size.value_or(0)));
  }
  if (reader.has("steps")) block.steps = reader.integer("steps", 1, INT_MAX);
  block.schedule = reader.named("schedule", kSchedules, block.schedule);
}

void read_unmasking(const KeyReader& reader, Unmask& unmask) {
  unmask.rule = reader.named("unmask", kUnmaskRules, unmask.rule);
  if (reader.has("proxy")) unmask.proxy = reader.named("proxy", kProxies, Proxy::entropy);

  constexpr double kLargest = std::numeric_limits<float>::max();
  const double gamma = reader.number("gamma", unmask.gamma);
  reader.check(gamma >= 0, "gamma", gamma, "0 or more nats, or infinity",
               "convert the checkpoint again with another --gamma");
  unmask.gamma =
      gamma > kLargest ? std::numeric_limits<float>::infinity() : static_cast<float>(gamma);
  const double factor = reader.number("factor", unmask.factor);
  reader.check(factor > 0 && factor <= kLargest, "factor", factor, "a finite number above 0");
  unmask.factor = static_cast<float>(factor);
  unmask.confidence_threshold = read_share(reader, "threshold", unmask.confidence_threshold);
  unmask.top_n = reader.integer("top_n", 1, INT_MAX, unmask.top_n);
}

void read_dmtd(const KeyReader& reader, DmtdMethod& dmtd) {
  dmtd.horizon = reader.integer("dmtd.horizon", 1, INT_MAX, dmtd.horizon);
  dmtd.prompt_rule = reader.named("dmtd.prompt_rule", kDmtdPromptRules, dmtd.prompt_rule);
}

void read_d2f(const KeyReader& reader, D2fMethod& d2f) {
  d2f.block_add_threshold = read_share(reader, "d2f.block_add_threshold", d2f.block_add_threshold);
  d2f.decoded_token_threshold =
      read_share(reader, "d2f.decoded_token_threshold", d2f.decoded_token_threshold);
  d2f.skip_threshold = read_share(reader, "d2f.skip_threshold", d2f.skip_threshold);
}

}  // namespace

DecoderOptions read_decode_defaults(const Metadata& metadata, const ModelConfig& config) {
  const KeyReader reader(metadata, "sbd.");
  refuse_unknown_keys(metadata);

  DecoderOptions defaults;
  defaults.named = read_decoders(reader, config);
  defaults.has_mask_token = config.mask_token_id.has_value();
  defaults.has_layer_cut = config.layer_runs[1] > 0;
  defaults.block.mask_token_id = config.mask_token_id.value_or(0);
  read_block(reader, config, defaults.block);
  read_unmasking(reader, defaults.block.unmask);
  read_dmtd(reader, defaults.dmtd);
  read_d2f(reader, defaults.d2f);
  return defaults;
}

}  // namespace sbd
