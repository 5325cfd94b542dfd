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

// What some block-diffusion families need and the decoders do not do: such a file is refused, as
// its text would be wrong.
void refuse_missing_features(const KeyReader& reader) {
  constexpr std::string_view kMend = "this engine cannot decode such a model yet";
  for (const std::string_view name : {"logit_shift", "seed_slot"}) {
    const int value = reader.integer(name, 0, 1, 0);
    reader.check(value == 0, name, value, "0", kMend);
  }
  constexpr std::string_view kStrings[][2] = {
      {"prompt_attention", "causal"}, {"commit_attention", "causal"}, {"block_origin", "prompt"}};
  for (const auto& [name, expected] : kStrings) {
    const std::string value = reader.string(name, expected);
    reader.check(value == expected, name, quote(value), quote(expected), kMend);
  }
  constexpr std::string_view kRead[] = {
      "mask_token_id", "eos_token_ids", "decoders",         "block_size",       "gamma",
      "unmask",        "proxy",         "factor",           "threshold",        "top_n",
      "logit_shift",   "seed_slot",     "prompt_attention", "commit_attention", "block_origin"};
  for (const auto& [key, value] : reader.metadata().entries()) {
    if (!key.starts_with("sbd.")) continue;
    const std::string_view name = std::string_view(key).substr(4);
    SBD_CHECK(std::find(std::begin(kRead), std::end(kRead), name) != std::end(kRead),
              "{}: key {} is one this engine does not know; {}", reader.metadata().source(),
              quote(key), kMend);
  }
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
    reader.check_one_of(*decoder, kDecoders, Names{"ntp", "sbd"});
    reader.check(std::find(decoders.begin(), decoder, *decoder) == decoder, kDecoders,
                 format("{} twice", quote(*decoder)), "each name once");
    reader.check(*decoder != "sbd" || config.mask_token_id.has_value(), kDecoders, "'sbd'",
                 "'ntp', as there is no mask token",
                 "convert the checkpoint again with --mask-token");
  }
  return decoders;
}

}  // namespace

DecodeDefaults read_decode_defaults(const Metadata& metadata, const ModelConfig& config) {
  const KeyReader reader(metadata, "sbd.");
  refuse_missing_features(reader);

  DecodeDefaults defaults;
  defaults.decoders = read_decoders(reader, config);
  const int most = std::min(config.max_position_embeddings, kMostBlockSize);
  defaults.block_size = reader.integer("block_size", 1, most, defaults.block_size);
  defaults.unmask = reader.string("unmask", defaults.unmask);
  reader.check_one_of(defaults.unmask, "unmask",
                      Names{"entropy_bounded", "factor", "confidence", "top_n"});
  defaults.proxy = reader.string("proxy", defaults.proxy);
  reader.check_one_of(defaults.proxy, "proxy", Names{"entropy", "confidence", "margin"});

  constexpr double kLargest = std::numeric_limits<float>::max();
  const double gamma = reader.number("gamma", defaults.gamma);
  reader.check(gamma >= 0, "gamma", gamma, "0 or more nats, or infinity",
               "convert the checkpoint again with another --gamma");
  defaults.gamma =
      gamma > kLargest ? std::numeric_limits<float>::infinity() : static_cast<float>(gamma);
  const double factor = reader.number("factor", defaults.factor);
  reader.check(factor > 0 && factor <= kLargest, "factor", factor, "a finite number above 0");
  defaults.factor = static_cast<float>(factor);
  const double threshold = reader.number("threshold", defaults.confidence_threshold);
  reader.check(threshold >= 0 && threshold <= 1, "threshold", threshold, "0 to 1");
  defaults.confidence_threshold = static_cast<float>(threshold);
  defaults.top_n = reader.integer("top_n", 1, INT_MAX, defaults.top_n);
  return defaults;
}

}  // namespace sbd
