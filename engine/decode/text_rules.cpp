#include "decode/text_rules.h"

#include <cmath>
#include <limits>

#include "core/error.h"

namespace sbd {

void check_rule_options(const RuleOptions& options) {
  const auto check_penalty = [](const char* name, float value) {
    SBD_CHECK(value >= -2.0f && value <= 2.0f, "expected `{}` from -2 to 2, got {}", name, value);
  };
  check_penalty("presence_penalty", options.presence_penalty);
  check_penalty("frequency_penalty", options.frequency_penalty);
  SBD_CHECK(options.repetition_penalty > 0.0f && std::isfinite(options.repetition_penalty),
            "expected a finite `repetition_penalty` above 0 (1 changes nothing), got {}",
            options.repetition_penalty);
  std::set<TokenId> named;
  for (const auto& [token, bias] : options.logit_bias) {
    SBD_CHECK(bias < std::numeric_limits<float>::infinity(),  // written so that NaN fails
              "expected a `logit_bias` below infinity, got {} for token {}", bias, token);
    SBD_CHECK(named.insert(token).second, "`logit_bias` names token {} twice", token);
  }
}

TextRules::TextRules(const RuleOptions& options, std::span<const TokenId> prompt)
    : options_(options), bias_(options.logit_bias.begin(), options.logit_bias.end()) {
  check_rule_options(options);
  none_ = bias_.empty() && !penalises() && options.logprobs < 0;
  if (options.repetition_penalty != 1.0f) prompt_.insert(prompt.begin(), prompt.end());
}

bool TextRules::penalises() const {
  return options_.presence_penalty != 0.0f || options_.frequency_penalty != 0.0f ||
         options_.repetition_penalty != 1.0f;
}

void TextRules::add(TokenId token) {
  if (!penalises()) return;
  ++counts_[token];
  now_ = nullptr;
}

std::shared_ptr<const LogitRules> TextRules::rules(std::span<const TokenId> draft) const {
  if (bias_.empty() && !penalises()) return nullptr;
  if (!penalises()) draft = {};
  if (draft.empty() && now_) return now_;
  std::map<TokenId, Adjustment> by_token;
  const auto of = [&](TokenId token) -> Adjustment& {
    return by_token.try_emplace(token, Adjustment{.token = token}).first->second;
  };
  for (const auto& [token, bias] : bias_) of(token).bias = bias;
  for (const TokenId token : prompt_) of(token).factor = options_.repetition_penalty;
  std::map<TokenId, int> counts = counts_;
  for (const TokenId token : draft) ++counts[token];
  for (const auto& [token, count] : counts) {
    Adjustment& one = of(token);
    one.factor = options_.repetition_penalty;
    one.penalty =
        options_.presence_penalty + options_.frequency_penalty * static_cast<float>(count);
  }
  auto rules = std::make_shared<LogitRules>();
  for (const auto& [token, one] : by_token) rules->adjustments.push_back(one);
  if (draft.empty()) now_ = rules;
  return rules;
}

RowAsk TextRules::ask(std::span<const TokenId> draft) const {
  return {.rules = rules(draft), .n_best = options_.logprobs};
}

void TextRules::ask_all(Segment& segment, std::span<const TokenId> draft) const {
  if (!none_) segment.asks.assign(segment.outputs.size(), ask(draft));
}

}  // namespace sbd
