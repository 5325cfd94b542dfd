// What the rows of a text are asked for beyond their statistics: biases, penalties on the tokens
// that are there, log-probabilities.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/batch.h"

namespace sbd {

struct RuleOptions {
  std::vector<std::pair<TokenId, float>> logit_bias = {};  // added; each token once
  // Taken off the logit of each token of the new text: once, and for each time it is there.
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  // Divides positive logits of the tokens of prompt and text, and multiplies negative ones.
  float repetition_penalty = 1.0f;
  int logprobs = -1;  // so many best tokens with each token's own; -1: none at all
};

// Refuses values that are no numbers or out of range, and tokens named twice.
void check_rule_options(const RuleOptions& options);

class TextRules {
 public:
  TextRules(const RuleOptions& options, std::span<const TokenId> prompt);

  // The token is in the text now.
  void add(TokenId token);
  // For the row that decides the token behind the text and a draft behind it.
  RowAsk ask(std::span<const TokenId> draft = {}) const;
  // The same for all outputs of the segment, without a draft; nothing where nothing is asked.
  void ask_all(Segment& segment) const;
  bool none() const { return none_; }

 private:
  bool penalises() const;
  // The token stands there so many times.
  void penalise(std::vector<Adjustment>& adjustments, TokenId token, int count) const;
  std::shared_ptr<const LogitRules> rules(std::span<const TokenId> draft) const;

  RuleOptions options_;
  bool none_;
  std::map<TokenId, int> counts_;  // of the text, where something counts
  std::vector<Adjustment> now_;    // what the text has come to, ascending by token
  mutable std::shared_ptr<const LogitRules> shared_;  // the same, for rows without a draft
};

}  // namespace sbd
