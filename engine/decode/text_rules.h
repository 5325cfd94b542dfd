// What the rows of a text are asked for beyond their statistics: biases, penalties on the tokens
// that are there, the tokens that a grammar allows, log-probabilities.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/batch.h"
#include "decode/constraint.h"

namespace sbd {

struct RuleOptions {
  std::vector<std::pair<TokenId, float>> logit_bias = {};  // added; each token once
  // Taken off the logit of each token of the new text: once, and for each time it is there.
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  // Divides positive logits of the tokens of prompt and text, and multiplies negative ones.
  float repetition_penalty = 1.0f;
  int logprobs = -1;  // so many best tokens with each token's own; -1: none at all
  std::shared_ptr<const Grammar> grammar = {};  // what the text must be; none: anything
};

// Refuses values that are no numbers or out of range, and tokens named twice.
void check_rule_options(const RuleOptions& options);

class TextRules {
 public:
  TextRules(const RuleOptions& options, std::span<const TokenId> prompt);

  // The token is in the text now.
  void add(TokenId token);
  // For the row that decides the token behind the text and a draft behind it; the grammar aside.
  RowAsk ask(std::span<const TokenId> draft = {}) const;
  // Biases and penalties there; none: there are none.
  std::shared_ptr<const LogitRules> rules(std::span<const TokenId> draft = {}) const;
  // For the segment's outputs, each of which may decide any place behind the text.
  void ask_all(Segment& segment) const;
  // The same, of which the first one decides the token behind the text.
  void ask_block(Plan& plan, Segment& segment) const;
  // For the segment's outputs, of which each decides the token behind the text and as many of the
  // draft's tokens as there are outputs before it.
  void ask_next(Plan& plan, Segment& segment, std::span<const TokenId> draft = {}) const;

  // What the grammar, if there is one, forces behind the text: tokens that need no row, unless
  // their log-probabilities are wanted.
  std::vector<TokenId> forced() const;
  bool constrained() const { return constrained_ != nullptr; }
  bool scored() const { return options_.logprobs >= 0; }
  // Whether the grammar lets the text only end.
  bool ended() const { return constrained_ && constrained_->ended(); }
  // The draft as the grammar lets it be; `open`: its token where nothing is decided.
  ConstrainedText::Followed follow(std::span<const TokenId> draft, TokenId open = -1) const;

 private:
  bool penalises() const;
  // The token stands there so many times.
  void penalise(std::vector<Adjustment>& adjustments, TokenId token, int count) const;
  // Lets the grammar say, once the layers are under way, which tokens each of the rows may decide.
  void constrain(Plan& plan, std::span<RowAsk> asks, std::span<const TokenId> draft) const;

  RuleOptions options_;
  bool none_;
  std::map<TokenId, int> counts_;  // of the text, where something counts
  std::vector<Adjustment> now_;    // what the text has come to, ascending by token
  mutable std::shared_ptr<const LogitRules> shared_;  // the same, for rows without a draft
  std::unique_ptr<ConstrainedText> constrained_;      // none: there is no grammar
};

}  // namespace sbd
