#include "request.h"

#include <utility>

#include "core/error.h"
#include "core/names.h"

namespace sbd {
namespace {

// A parameter that only one rule has asks for that rule.
UnmaskRule asked_rule(const Request& request, UnmaskRule own) {
  if (request.unmask) return find_named(kUnmaskRules, "unmask", *request.unmask);
  SBD_CHECK(
      request.gamma.has_value() + request.factor.has_value() +
              request.confidence_threshold.has_value() <=
          1,
      "expected one of gamma, factor and confidence_threshold, as each asks for its own rule, "
      "got several: name the rule with unmask");
  if (request.gamma) return UnmaskRule::entropy_bounded;
  if (request.factor) return UnmaskRule::factor;
  if (request.confidence_threshold) return UnmaskRule::confidence;
  const bool counts = own == UnmaskRule::top_n || own == UnmaskRule::confidence;
  return (request.top_n || request.steps) && !counts ? UnmaskRule::top_n : own;
}

}  // namespace

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
              "logit_bias names token {}, outside the vocabulary of {}", token, config.vocab_size);
  }
  SBD_CHECK(request.logprobs <= config.vocab_size,
            "expected logprobs of at most the vocabulary of {}, got {}", config.vocab_size,
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
