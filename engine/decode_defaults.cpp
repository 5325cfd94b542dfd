#include "decode_defaults.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"
#include "format/key_reader.h"
#include "format/text.h"

namespace sbd {
namespace {

// Beside those of the table of options.
constexpr std::string_view kOtherKeys[] = {"mask_token_id",    "eos_token_ids", "decoders",
                                           "sub_block_size",   "schedule",      "logit_shift",
                                           "seed_slot",        "block_origin",  "prompt_attention",
                                           "commit_attention", "dmtd.layers",   "dmtd.prompt_rule"};

// A key that is not known here is refused: text decoded without what it asks for would be wrong.
void refuse_unknown_keys(const Metadata& metadata) {
  for (const auto& [key, value] : metadata.entries()) {
    if (!key.starts_with("sbd.")) continue;
    const std::string_view name = std::string_view(key).substr(4);
    const bool known = std::ranges::find(kOtherKeys, name) != std::end(kOtherKeys) ||
                       std::ranges::any_of(all_options(), [&](const Option& option) {
                         return name == option.key || name == option.older_key;
                       });
    SBD_CHECK(known,
              "{}: key {} is one this engine does not know; this engine cannot decode such a model "
              "yet",
              metadata.source(), quote(key));
  }
}

OptionValue read_value(const KeyReader& reader, const Option& option, std::string_view key) {
  const Range& range = option.range;
  switch (option.type) {
    case OptionType::integer:
      return reader.integer(key, static_cast<int>(range.low), static_cast<int>(range.high));
    case OptionType::number: {
      const double value = reader.number(key, 0);
      constexpr double kLargest = std::numeric_limits<float>::max();
      const float held =
          value > kLargest ? std::numeric_limits<float>::infinity() : static_cast<float>(value);
      reader.check(range.holds(held), key, value, range.words());
      return held;
    }
    case OptionType::name: break;
  }
  std::string name = reader.string(key, "");
  reader.check_one_of(name, key, option.choices());
  return name;
}

void read_options(const KeyReader& reader, DecoderOptions& defaults) {
  for (const Option& option : all_options()) {
    const bool older = !option.older_key.empty() && reader.has(option.older_key);
    SBD_CHECK(!older || !reader.has(option.key),
              "{}: key '{}' is the older name of '{}', which is there too: remove one",
              reader.metadata().source(), reader.key(option.older_key), reader.key(option.key));
    const std::string_view key = older ? option.older_key : option.key;
    if (reader.has(key)) option.set(defaults, read_value(reader, option, key));
  }
}

std::vector<std::string> read_decoders(const KeyReader& reader, const ModelConfig& config) {
  constexpr std::string_view kKey = "decoders";
  if (!reader.has(kKey)) {
    const bool sbd = reader.has("block_size") && config.mask_token_id.has_value();
    return sbd ? std::vector<std::string>{"sbd", "ntp"} : std::vector<std::string>{"ntp"};
  }
  const auto& decoders = reader.metadata().strings(reader.key(kKey));
  reader.check(!decoders.empty(), kKey, "an empty array", "at least one name");
  const std::vector<std::string> known = decoder_names();
  for (auto decoder = decoders.begin(); decoder != decoders.end(); ++decoder) {
    reader.check_one_of(*decoder, kKey, known);
    reader.check(std::find(decoders.begin(), decoder, *decoder) == decoder, kKey,
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

  const int most = std::min(config.max_position_embeddings, kMaxBlockSize);
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
  block.schedule = reader.named("schedule", kSchedules, block.schedule);
}

}  // namespace

DecoderOptions read_decode_defaults(const Metadata& metadata, const ModelConfig& config) {
  const KeyReader reader(metadata, "sbd.");
  refuse_unknown_keys(metadata);

  DecoderOptions defaults;
  defaults.named = read_decoders(reader, config);
  defaults.has_mask_token = config.mask_token_id.has_value();
  defaults.has_layer_cut = config.layer_sections[1] > 0;
  defaults.block.mask_token_id = config.mask_token_id.value_or(kMaskSlot);
  read_block(reader, config, defaults.block);
  read_options(reader, defaults);
  defaults.dmtd.prompt_rule =
      reader.named("dmtd.prompt_rule", kDmtdPromptRules, defaults.dmtd.prompt_rule);
  return defaults;
}

namespace {

std::vector<float> read_prior(const Metadata& adapter, std::string_view key, int block_size) {
  if (!adapter.contains(key)) return {};
  const std::vector<double>& values = adapter.numbers(key);
  SBD_CHECK(std::ssize(values) <= block_size,
            "{}: key '{}' has {} numbers, expected at most {}, one for each slot of a block",
            adapter.source(), key, values.size(), block_size);
  std::vector<float> prior;
  for (const double value : values) {
    SBD_CHECK(value >= 0 && value <= 1, "{}: key '{}' has {}, expected numbers from 0 to 1",
              adapter.source(), key, value);
    prior.push_back(static_cast<float>(value));
  }
  return prior;
}

}  // namespace

DecoderOptions with_adapter(const Metadata& adapter, bool has_mask, const ModelConfig& config,
                            DecoderOptions defaults) {
  const KeyReader reader(adapter, "sbd.");
  const int n_ctx = config.max_position_embeddings;
  defaults.has_adapter = true;
  defaults.has_mask_embedding = has_mask;
  if (std::ranges::none_of(defaults.named, drafts)) {
    defaults.named.insert(defaults.named.begin(), "sbd_lossless");
  }
  std::ranges::stable_partition(defaults.named, drafts);
  if (reader.has("block_size")) {
    defaults.block.block_size = reader.integer("block_size", 1, std::min(n_ctx, kMaxBlockSize));
  }
  if (const auto why = refusal(defaults.named.front(), defaults, n_ctx)) {
    fail(ErrorKind::value, "{}: no decoder of this model can draft with it: {}", adapter.source(),
         *why);
  }
  const int block_size = *defaults.block.block_size;
  defaults.drafts = std::make_shared<DraftHistory>(
      DraftHistory::Priors{.known = read_prior(adapter, "sbd.draft.acceptance", block_size),
                           .fused = read_prior(adapter, "sbd.draft.acceptance_fused", block_size)});
  return defaults;
}

}  // namespace sbd
