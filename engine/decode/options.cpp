#include "decode/options.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <ranges>
#include <string>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "core/names.h"

namespace sbd {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Range kShare = {0, 1};
constexpr Range kCount = {1, std::numeric_limits<int>::max()};
// A hundred times the largest in use. Steps that decide nothing are passed over one by one.
constexpr int kMaxSteps = 1 << 16;

constexpr unsigned bit(UnmaskRule rule) { return 1u << static_cast<unsigned>(rule); }
constexpr unsigned kByEntropy = bit(UnmaskRule::entropy_bounded);
constexpr unsigned kByFactor = bit(UnmaskRule::factor);
constexpr unsigned kByConfidence = bit(UnmaskRule::confidence);
constexpr unsigned kByNumber = bit(UnmaskRule::top_n);

template <typename T>
struct Unwrapped {
  using Type = T;
};
template <typename T>
struct Unwrapped<std::optional<T>> {
  using Type = T;
};

// The field that the members lead to, one by one.
template <auto first, auto... rest>
auto& field(auto& options) {
  if constexpr (sizeof...(rest) == 0) {
    return options.*first;
  } else {
    return field<rest...>(options.*first);
  }
}
template <auto... path>
using Value = typename Unwrapped<
    std::remove_cvref_t<decltype(field<path...>(std::declval<DecoderOptions&>()))>>::Type;

template <auto... path>
constexpr Option number(Range range, Option option) {
  using Type = Value<path...>;
  option.type = std::is_same_v<Type, int> ? OptionType::integer : OptionType::number;
  option.range = range;
  option.get = [](const DecoderOptions& options) -> std::optional<OptionValue> {
    return field<path...>(options);
  };
  option.set = [](DecoderOptions& options, const OptionValue& value) {
    field<path...>(options) = std::get<Type>(value);
  };
  return option;
}

template <const auto& names, auto... path>
constexpr Option name(Option option) {
  option.type = OptionType::name;
  option.choices = [] {
    const auto all = names_of(names);
    return std::vector<std::string_view>(all.begin(), all.end());
  };
  option.get = [](const DecoderOptions& options) -> std::optional<OptionValue> {
    const std::optional<Value<path...>> value = field<path...>(options);
    if (!value) return std::nullopt;
    return std::string(name_of(names, *value));
  };
  option.set = [](DecoderOptions& options, const OptionValue& value) {
    field<path...>(options) = find_named(names, "name", std::get<std::string>(value));
  };
  return option;
}

using Options = DecoderOptions;
constexpr auto kBlock = &Options::block;
constexpr auto kUnmask = &BlockMethod::unmask;

constexpr Option kOptions[] = {
    number<kBlock, &BlockMethod::block_size>({1, kMaxBlockSize}, {.name = "block_size",
                                                                  .key = "block_size",
                                                                  .group = option_group::block,
                                                                  .help = "Positions per block."}),
    name<kUnmaskRules, kBlock, kUnmask, &Unmask::rule>(
        {.name = "unmask",
         .key = "unmask",
         .group = option_group::unmask,
         .help =
             "Which positions a forward decides: entropy_bounded, factor, confidence or top_n."}),
    number<kBlock, kUnmask, &Unmask::gamma>(
        {0, kInfinity},
        {.name = "gamma",
         .key = "gamma",
         .group = option_group::unmask,
         .rules = kByEntropy,
         .help = "Bound of entropy_bounded, in nats: 0 decides one token per forward, inf the "
                 "whole block."}),
    name<kProxies, kBlock, kUnmask, &Unmask::proxy>(
        {.name = "proxy",
         .key = "proxy",
         .group = option_group::unmask,
         .rules = kByEntropy | kByNumber,
         .help = "Order of entropy_bounded and top_n: entropy, confidence, margin or position."}),
    number<kBlock, kUnmask, &Unmask::factor>({0, kInfinity, true}, {.name = "factor",
                                                                    .key = "factor",
                                                                    .group = option_group::unmask,
                                                                    .rules = kByFactor,
                                                                    .help = "Of unmask factor."}),
    number<kBlock, kUnmask, &Unmask::confidence_threshold>(kShare, {.name = "confidence_threshold",
                                                                    .key = "confidence_threshold",
                                                                    .group = option_group::unmask,
                                                                    .rules = kByConfidence,
                                                                    .help = "Of unmask confidence.",
                                                                    .older_key = "threshold"}),
    number<kBlock, kUnmask, &Unmask::top_n>(
        kCount, {.name = "top_n",
                 .key = "top_n",
                 .group = option_group::unmask,
                 .rules = kByNumber | kByConfidence,
                 .help = "Of unmask top_n; of confidence: how many at least."}),
    number<kBlock, &BlockMethod::steps>({1, kMaxSteps},
                                        {.name = "steps",
                                         .key = "steps",
                                         .group = option_group::steps,
                                         .rules = kByNumber | kByConfidence,
                                         .help = "Forwards per block that top_n is spread over."}),
    number<&Options::dmtd, &DmtdMethod::horizon>(
        kCount, {.name = "horizon",
                 .key = "dmtd.horizon",
                 .group = option_group::dmtd,
                 .help = "Of dmtd: tokens per pass of all layers."}),
    number<&Options::d2f, &D2fMethod::block_add_threshold>(
        kShare, {.name = "block_add_threshold",
                 .key = "d2f.block_add_threshold",
                 .group = option_group::d2f,
                 .help = "Of d2f: the share of a block decided before the next is added."}),
    number<&Options::d2f, &D2fMethod::decoded_token_threshold>(
        kShare, {.name = "decoded_token_threshold",
                 .key = "d2f.decoded_token_threshold",
                 .group = option_group::d2f,
                 .help = "Of d2f: the share decided before the next block must go on."}),
    number<&Options::d2f, &D2fMethod::skip_threshold>(
        kShare, {.name = "skip_threshold",
                 .key = "d2f.skip_threshold",
                 .group = option_group::d2f,
                 .help = "Of d2f: the probability above which a token is decided."}),
};

}  // namespace

std::string Range::words() const {
  if (above) return format("above {}", low);
  const bool bounded = high < std::numeric_limits<int>::max();
  return bounded ? format("from {} to {}", low, high) : format(">= {}", low);
}

std::span<const Option> all_options() { return kOptions; }

const Option& find_option(std::string_view name) {
  const auto found = std::ranges::find(kOptions, name, &Option::name);
  SBD_CHECK(found != std::end(kOptions), "unknown option \"{}\": expected one of {}", name,
            joined(kOptions | std::views::transform(&Option::name)));
  return *found;
}

void check_option(const Option& option, const OptionValue& value) {
  if (option.type == OptionType::name) {
    const std::vector<std::string_view> names = option.choices();
    const auto& name = std::get<std::string>(value);
    SBD_CHECK(std::ranges::find(names, name) != names.end(),
              "unknown `{}` \"{}\": expected one of {}", option.name, name, joined(names));
    return;
  }
  const double number = option.type == OptionType::integer
                            ? std::get<int>(value)
                            : static_cast<double>(std::get<float>(value));
  SBD_CHECK(option.range.holds(number), "expected `{}` {}, got {}", option.name,
            option.range.words(), number);
}

void check_options(const DecoderOptions& options) {
  for (const Option& option : kOptions) {
    if (const auto value = option.get(options)) check_option(option, *value);
  }
}

DecoderOptions with_options(const OptionValues& asked, DecoderOptions file) {
  DecoderOptions options = std::move(file);
  for (const auto& [name, value] : asked) {
    const Option& option = find_option(name);
    check_option(option, value);
    option.set(options, value);
  }
  return options;
}

}  // namespace sbd
