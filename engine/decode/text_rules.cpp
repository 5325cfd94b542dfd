#include "decode/text_rules.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

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
    : options_(options) {
  check_rule_options(options);
  none_ = options.logit_bias.empty() && !penalises() && options.logprobs < 0;
  std::map<TokenId, Adjustment> by_token;
  const auto of = [&](TokenId token) -> Adjustment& {
    return by_token.try_emplace(token, Adjustment{.token = token}).first->second;
  };
  for (const auto& [token, bias] : options.logit_bias) of(token).bias = bias;
  if (options.repetition_penalty != 1.0f) {
    for (const TokenId token : prompt) of(token).factor = options.repetition_penalty;
  }
  for (const auto& [token, one] : by_token) now_.push_back(one);
  if (options.grammar) constrained_ = std::make_unique<ConstrainedText>(*options.grammar);
}

bool TextRules::penalises() const {
  return options_.presence_penalty != 0.0f || options_.frequency_penalty != 0.0f ||
         options_.repetition_penalty != 1.0f;
}

void TextRules::penalise(std::vector<Adjustment>& adjustments, TokenId token, int count) const {
  auto one = std::ranges::lower_bound(adjustments, token, {}, &Adjustment::token);
  if (one == adjustments.end() || one->token != token) {
    one = adjustments.insert(one, {.token = token});
  }
  one->factor = options_.repetition_penalty;
  one->penalty = options_.presence_penalty + options_.frequency_penalty * static_cast<float>(count);
}

void TextRules::add(TokenId token) {
  if (constrained_) constrained_->add(token);
  if (!penalises()) return;
  penalise(now_, token, ++counts_[token]);
  shared_ = nullptr;
}

std::shared_ptr<const LogitRules> TextRules::rules(std::span<const TokenId> draft) const {
  if (now_.empty() && !penalises()) return nullptr;
  if (draft.empty() || !penalises()) {
    if (!shared_) shared_ = std::make_shared<LogitRules>(LogitRules{.adjustments = now_});
    return shared_;
  }
  LogitRules behind{.adjustments = now_};
  std::map<TokenId, int> counts;  // of the draft's tokens, in the text and before them
  for (const TokenId token : draft) {
    const auto in_text = counts_.find(token);
    const auto [count, is_new] =
        counts.try_emplace(token, in_text == counts_.end() ? 0 : in_text->second);
    penalise(behind.adjustments, token, ++count->second);
  }
  return std::make_shared<LogitRules>(std::move(behind));
}

RowAsk TextRules::ask(std::span<const TokenId> draft) const {
  return {.rules = rules(draft), .n_best = options_.logprobs};
}

void TextRules::ask_all(Segment& segment) const {
  if (!none_) segment.asks.assign(segment.outputs.size(), ask({}));
}

void TextRules::ask_block(Plan& plan, Segment& segment) const {
  if (none_ && !constrained_) return;
  segment.asks.assign(segment.outputs.size(), ask({}));
  constrain(plan, std::span(segment.asks).first(1), {});
}

void TextRules::ask_next(Plan& plan, Segment& segment, std::span<const TokenId> draft) const {
  if (none_ && !constrained_) return;
  for (std::size_t i = 0; i < segment.outputs.size(); ++i) {
    segment.asks.push_back(ask(draft.first(std::min(i, draft.size()))));
  }
  constrain(plan, segment.asks, draft);
}

// A row behind a token of the draft that is not allowed decides nothing: what it is taken under is
// all the same.
void TextRules::constrain(Plan& plan, std::span<RowAsk> asks,
                          std::span<const TokenId> draft) const {
  if (!constrained_ || asks.empty()) return;
  std::vector<std::shared_ptr<LogitRules>> masked;
  for (RowAsk& ask : asks) {
    masked.push_back(std::make_shared<LogitRules>(ask.rules ? *ask.rules : LogitRules{}));
    ask.rules = masked.back();
  }
  const auto known = draft.first(std::min(asks.size() - 1, draft.size()));
  plan.before_head = [text = constrained_.get(), masked = std::move(masked),
                      draft = std::vector(known.begin(), known.end())] {
    const std::vector<TokenSet> sets = text->allowed(draft);
    for (std::size_t i = 0; i < masked.size(); ++i) {
      masked[i]->allowed = sets[std::min(i, sets.size() - 1)];
    }
  };
}

std::vector<TokenId> TextRules::forced() const {
  if (!constrained_ || options_.logprobs >= 0) return {};
  return constrained_->forced();
}

ConstrainedText::Followed TextRules::follow(std::span<const TokenId> draft, TokenId open) const {
  if (constrained_) return constrained_->follow(draft, open);
  return {.tokens = {draft.begin(), draft.end()}};
}

}  // namespace sbd
