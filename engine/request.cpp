#include "request.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/names.h"

namespace sbd {
namespace {

// A parameter that only one rule has asks for that rule.
UnmaskRule asked_rule(const Request& request, UnmaskRule own) {
  if (request.unmask) return find_named(kUnmaskRules, "unmask", *request.unmask);
  SBD_CHECK(request.gamma.has_value() + request.factor.has_value() +
                    request.confidence_threshold.has_value() <=
                1,
            "expected one of `gamma`, `factor` and `confidence_threshold`, as each asks for its "
            "own rule, "
            "got several: name the rule with `unmask`");
  if (request.gamma) return UnmaskRule::entropy_bounded;
  if (request.factor) return UnmaskRule::factor;
  if (request.confidence_threshold) return UnmaskRule::confidence;
  const bool counts = own == UnmaskRule::top_n || own == UnmaskRule::confidence;
  return (request.top_n || request.steps) && !counts ? UnmaskRule::top_n : own;
}

bool holds(std::span<const std::string_view> names, std::string_view name) {
  return std::ranges::find(names, name) != names.end();
}

// Names of the rules that read an option; none where it is no rule's.
std::vector<std::string_view> rules_with(std::string_view option) {
  std::vector<std::string_view> rules;
  for (const auto& [name, rule] : kUnmaskRules) {
    if (holds(options_of(rule), option)) rules.push_back(name);
  }
  return rules;
}

std::vector<std::string_view> options_asked(const Request& request) {
  const std::pair<std::string_view, bool> options[] = {
      {"block_size", request.block_size.has_value()},
      {"unmask", request.unmask.has_value()},
      {"gamma", request.gamma.has_value()},
      {"proxy", request.proxy.has_value()},
      {"factor", request.factor.has_value()},
      {"confidence_threshold", request.confidence_threshold.has_value()},
      {"top_n", request.top_n.has_value()},
      {"steps", request.steps.has_value()},
      {"horizon", request.horizon.has_value()},
      {"block_add_threshold", request.block_add_threshold.has_value()},
      {"decoded_token_threshold", request.decoded_token_threshold.has_value()},
      {"skip_threshold", request.skip_threshold.has_value()},
  };
  std::vector<std::string_view> asked;
  for (const auto& [name, given] : options) {
    if (given) asked.push_back(name);
  }
  return asked;
}

}  // namespace

std::vector<std::string_view> options_in_force(const std::string& decoder,
                                               const DecoderOptions& options) {
  std::vector<std::string_view> names;
  for (const std::string_view name : options_of(decoder)) {
    const bool of_a_rule = !rules_with(name).empty();
    if (of_a_rule && !holds(options_of(options.block.unmask.rule), name)) continue;
    if (name == "top_n" && options.block.steps) continue;
    names.push_back(name);
  }
  return names;
}

void check_effect(const Request& request, const std::string& decoder, const DecoderOptions& options,
                  int n_ctx) {
  const std::vector<std::string_view> in_force = options_in_force(decoder, options);
  for (const std::string_view name : options_asked(request)) {
    if (holds(in_force, name)) continue;
    if (!holds(options_of(decoder), name)) {
      std::vector<std::string> others = able_decoders(options, n_ctx);
      std::erase_if(others, [&](const auto& other) { return !holds(options_of(other), name); });
      fail(ErrorKind::value, "`{}` has no effect with decoder \"{}\": leave it out{}{}", name,
           decoder, others.empty() ? "" : ", or use `decoder` ", joined(others));
    }
    SBD_CHECK(name != "top_n" || !request.steps,
              "`top_n` has no effect beside `steps`, which spreads a block over that many "
              "forwards: leave one of them out");
    fail(ErrorKind::value, "`{}` has no effect with unmask {}: leave it out, or use `unmask` {}",
         name, name_of(kUnmaskRules, options.block.unmask.rule), joined(rules_with(name)));
  }
  const auto check_sampling = [&](bool given, const char* name) {
    SBD_CHECK(!given || request.temperature > 0.0f,
              "`{}` has no effect at temperature 0, which takes the most probable token: leave it "
              "out, or give a `temperature` above 0",
              name);
  };
  check_sampling(request.top_k > 0, "top_k");
  check_sampling(request.top_p < 1.0f, "top_p");
  check_sampling(request.min_p > 0.0f, "min_p");
}

DecodeTask decode_task(const Request& request, const ModelConfig& config, int n_ctx) {
  for (const TokenId token : request.prompt) {
    SBD_CHECK(token >= 0 && token < config.vocab_size,
              "token id {} is outside the vocabulary of {}", token, config.vocab_size);
  }
  DecodeTask task;
  task.prompt = request.prompt;
  task.max_tokens = request.max_tokens;
  task.n_ctx = n_ctx;
  if (!request.ignore_eos) task.eos_token_ids = config.eos_token_ids;
  task.sampling = {.temperature = request.temperature,
                   .top_k = request.top_k,
                   .top_p = request.top_p,
                   .min_p = request.min_p,
                   .seed = request.seed,
                   .sample_index = request.sample_index};
  for (const auto& [token, bias] : request.logit_bias) {
    SBD_CHECK(token >= 0 && token < config.vocab_size,
              "`logit_bias` names token {}, outside the vocabulary of {}", token,
              config.vocab_size);
  }
  SBD_CHECK(request.logprobs <= config.vocab_size,
            "expected `logprobs` of at most the vocabulary of {}, got {}", config.vocab_size,
            request.logprobs);
  task.rules = {.logit_bias = request.logit_bias,
                .presence_penalty = request.presence_penalty,
                .frequency_penalty = request.frequency_penalty,
                .repetition_penalty = request.repetition_penalty,
                .logprobs = request.logprobs};
  return task;
}

DecoderOptions decoder_options(const Request& request, DecoderOptions file) {
  DecoderOptions options = std::move(file);
  const auto take = [](auto& value, const auto& asked) {
    if (asked) value = *asked;
  };
  take(options.block.block_size, request.block_size);
  // A number of positions or of forwards: the one asked for stands in for the file's other.
  if (request.top_n) options.block.steps.reset();
  take(options.block.steps, request.steps);

  Unmask& unmask = options.block.unmask;
  const UnmaskRule rule = asked_rule(request, unmask.rule);
  if (rule != unmask.rule) unmask.proxy.reset();  // the file's order is its own rule's
  unmask.rule = rule;
  if (request.proxy) unmask.proxy = find_named(kProxies, "proxy", *request.proxy);
  take(unmask.gamma, request.gamma);
  take(unmask.factor, request.factor);
  take(unmask.confidence_threshold, request.confidence_threshold);
  take(unmask.top_n, request.top_n);

  take(options.dmtd.horizon, request.horizon);
  take(options.d2f.block_add_threshold, request.block_add_threshold);
  take(options.d2f.decoded_token_threshold, request.decoded_token_threshold);
  take(options.d2f.skip_threshold, request.skip_threshold);
  return options;
}

}  // namespace sbd
