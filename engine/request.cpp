#include "request.h"

#include <algorithm>
#include <bit>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "core/names.h"

namespace sbd {
namespace {

// A parameter that only one rule has asks for that rule.
UnmaskRule asked_rule(const OptionValues& asked, UnmaskRule own) {
  if (const auto rule = asked.find("unmask"); rule != asked.end()) {
    return find_named(kUnmaskRules, "unmask", std::get<std::string>(rule->second));
  }
  std::vector<std::string> of_one_rule;
  std::vector<UnmaskRule> rules;
  for (const Option& option : all_options()) {
    if (!std::has_single_bit(option.rules)) continue;
    of_one_rule.push_back(format("`{}`", option.name));
    if (!asked.contains(option.name)) continue;
    rules.push_back(static_cast<UnmaskRule>(std::countr_zero(option.rules)));
  }
  SBD_CHECK(rules.size() <= 1,
            "expected one of {}, as each asks for its own rule, got several: name the rule with "
            "`unmask`",
            joined(of_one_rule));
  if (!rules.empty()) return rules[0];
  const bool counted = asked.contains("top_n") || asked.contains("steps");
  return counted && !find_option("top_n").read_by(own) ? UnmaskRule::top_n : own;
}

// Names of the rules that read it.
std::vector<std::string_view> rules_with(const Option& option) {
  std::vector<std::string_view> rules;
  for (const auto& [name, rule] : kUnmaskRules) {
    if (option.read_by(rule)) rules.push_back(name);
  }
  return rules;
}

}  // namespace

std::vector<const Option*> options_in_force(const std::string& decoder,
                                            const DecoderOptions& options) {
  std::vector<const Option*> in_force;
  for (const Option& option : all_options()) {
    if (!reads(decoder, option) || !option.read_by(options.block.unmask.rule)) continue;
    if (option.name == "top_n" && options.block.steps) continue;
    in_force.push_back(&option);
  }
  return in_force;
}

void check_effect(const Request& request, const std::string& decoder, const DecoderOptions& options,
                  int n_ctx) {
  const std::vector<const Option*> in_force = options_in_force(decoder, options);
  for (const Option& option : all_options()) {
    if (!request.options.contains(option.name)) continue;
    if (std::ranges::find(in_force, &option) != in_force.end()) continue;
    if (!reads(decoder, option)) {
      std::vector<std::string> others = able_decoders(options, n_ctx);
      std::erase_if(others, [&](const auto& other) { return !reads(other, option); });
      fail(ErrorKind::value, "`{}` has no effect with decoder \"{}\": leave it out{}{}",
           option.name, decoder, others.empty() ? "" : ", or use `decoder` ", joined(others));
    }
    SBD_CHECK(option.name != "top_n" || !request.options.contains("steps"),
              "`top_n` has no effect beside `steps`, which spreads a block over that many "
              "forwards: leave one of them out");
    fail(ErrorKind::value, "`{}` has no effect with unmask {}: leave it out, or use `unmask` {}",
         option.name, name_of(kUnmaskRules, options.block.unmask.rule), joined(rules_with(option)));
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
  SBD_CHECK(!request.grammar || !request.ignore_eos,
            "`ignore_eos` has no effect with `{}`, which says where the text may end: leave it out",
            request.grammar->name());
  const int n_best = request.logprobs.value_or(-1);
  SBD_CHECK(n_best <= config.vocab_size,
            "expected `logprobs` of at most the vocabulary of {}, got {}", config.vocab_size,
            n_best);
  task.rules = {.logit_bias = request.logit_bias,
                .presence_penalty = request.presence_penalty,
                .frequency_penalty = request.frequency_penalty,
                .repetition_penalty = request.repetition_penalty,
                .logprobs = n_best,
                .grammar = request.grammar};
  return task;
}

DecoderOptions decoder_options(const OptionValues& asked, DecoderOptions file) {
  Unmask& unmask = file.block.unmask;
  const UnmaskRule rule = asked_rule(asked, unmask.rule);
  if (rule != unmask.rule) unmask.proxy.reset();  // the file's order is its own rule's
  unmask.rule = rule;
  // A number of positions or of forwards: the one asked for stands in for the file's other.
  if (asked.contains("top_n")) file.block.steps.reset();
  DecoderOptions options = with_options(asked, std::move(file));
  options.block_size_asked = asked.contains("block_size");
  options.unmask_asked = std::ranges::any_of(all_options(), [&](const Option& option) {
    return option.group == option_group::unmask && asked.contains(option.name);
  });
  return options;
}

}  // namespace sbd
