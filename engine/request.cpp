#include "request.h"

#include "core/error.h"
#include "decode/names.h"

namespace sbd {
namespace {

constexpr Named<PromptAttention> kPromptAttentions[] = {
    {"causal", PromptAttention::causal},
    {"bidirectional", PromptAttention::bidirectional},
    {"block_causal", PromptAttention::block_causal},
    {"full", PromptAttention::full},
};
constexpr Named<CommitAttention> kCommitAttentions[] = {
    {"causal", CommitAttention::causal},
    {"block", CommitAttention::block},
    {"none", CommitAttention::none},
};
constexpr Named<Schedule> kSchedules[] = {
    {"even", Schedule::even},
    {"linear", Schedule::linear},
};
constexpr Named<DmtdPromptRule> kPromptRules[] = {
    {"all_heads", DmtdPromptRule::all_heads},
    {"plain", DmtdPromptRule::plain},
    {"train", DmtdPromptRule::train},
};

// A parameter that only one rule has asks for that rule.
UnmaskRule rule(const Request& request, const DecodeDefaults& defaults) {
  if (request.unmask) return unmask_rule(*request.unmask);
  SBD_CHECK(
      request.gamma.has_value() + request.factor.has_value() +
              request.confidence_threshold.has_value() <=
          1,
      "expected one of gamma, factor and confidence_threshold, as each asks for its own rule, "
      "got several: name the rule with unmask");
  if (request.gamma) return UnmaskRule::entropy_bounded;
  if (request.factor) return UnmaskRule::factor;
  if (request.confidence_threshold) return UnmaskRule::confidence;
  const UnmaskRule own = unmask_rule(defaults.unmask);
  const bool counts = own == UnmaskRule::top_n || own == UnmaskRule::confidence;
  return (request.top_n || request.steps) && !counts ? UnmaskRule::top_n : own;
}

Unmask unmasking(const Request& request, const DecodeDefaults& defaults) {
  Unmask unmask;
  unmask.rule = rule(request, defaults);
  // The file's order is its own rule's.
  const bool same_rule = unmask.rule == unmask_rule(defaults.unmask);
  const std::string proxy = request.proxy.value_or(same_rule ? defaults.proxy : "");
  if (!proxy.empty() || request.proxy) unmask.proxy = unmask_proxy(proxy);
  unmask.gamma = request.gamma.value_or(defaults.gamma);
  unmask.factor = request.factor.value_or(defaults.factor);
  unmask.confidence_threshold =
      request.confidence_threshold.value_or(defaults.confidence_threshold);
  unmask.top_n = request.top_n.value_or(defaults.top_n);
  return unmask;
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
                   .seed = request.seed,
                   .sample_index = request.sample_index};
  return task;
}

DecoderOptions decoder_options(const Request& request, const ModelConfig& config,
                               const DecodeDefaults& defaults, bool has_adapter) {
  DecoderOptions options;
  options.has_adapter = has_adapter;
  options.named = defaults.decoders;
  options.has_mask_token = config.mask_token_id.has_value();

  BlockMethod& block = options.block;
  block.mask_token_id = config.mask_token_id.value_or(0);
  block.block_size = request.block_size.value_or(defaults.block_size);
  block.sub_block_size = defaults.sub_block_size;
  block.steps = request.steps.value_or(defaults.steps);
  block.schedule = find_named(kSchedules, "schedule", defaults.schedule);
  block.unmask = unmasking(request, defaults);
  block.logit_shift = defaults.logit_shift;
  block.seed_slot = defaults.seed_slot;
  block.absolute_blocks = defaults.block_origin == "absolute";
  block.prompt_attention =
      find_named(kPromptAttentions, "prompt_attention", defaults.prompt_attention);
  block.commit_attention =
      find_named(kCommitAttentions, "commit_attention", defaults.commit_attention);

  if (config.layer_runs[1] > 0) {
    options.dmtd =
        DmtdMethod{.horizon = request.horizon.value_or(defaults.horizon),
                   .prompt_rule = find_named(kPromptRules, "prompt_rule", defaults.prompt_rule)};
  }
  options.d2f = {
      .mask_token_id = block.mask_token_id,
      .block_size = block.block_size,
      .logit_shift = defaults.logit_shift,
      .block_add_threshold = request.block_add_threshold.value_or(defaults.block_add_threshold),
      .decoded_token_threshold =
          request.decoded_token_threshold.value_or(defaults.decoded_token_threshold),
      .skip_threshold = request.skip_threshold.value_or(defaults.skip_threshold)};
  return options;
}

}  // namespace sbd
