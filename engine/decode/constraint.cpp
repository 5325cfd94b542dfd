#include "decode/constraint.h"

#include <utility>

#include "core/error.h"

namespace sbd {
namespace {

void pop_front(std::vector<TokenId>& tokens) {
  if (!tokens.empty()) tokens.erase(tokens.begin());
}

}  // namespace

ConstrainedText::ConstrainedText(const Grammar& grammar)
    : constraint_(grammar.begin()), vocab_size_(grammar.vocab_size()) {}

const ConstrainedText::Due& ConstrainedText::due() {
  if (!due_) due_ = constraint_->forced();
  return *due_;
}

void ConstrainedText::settle() {
  for (const TokenId token : std::exchange(added_, {})) {
    const bool may = due().empty() || due_->front() == token;
    if (!may || !constraint_->consume(token)) {
      fail(ErrorKind::grammar, "token {} may not follow in this grammar, or has met its limits",
           token);
    }
    pop_front(*due_);
    if (due_->empty()) due_.reset();
    ended_.reset();
  }
}

void ConstrainedText::look() {
  if (added_.empty() && ended_) return;
  constraint_->in_one_go([&] {
    settle();
    ended_ = due().empty() && constraint_->ended();
  });
}

std::vector<TokenId> ConstrainedText::forced() {
  look();
  return *due_;
}

bool ConstrainedText::ended() {
  look();
  return *ended_;
}

std::vector<TokenSet> ConstrainedText::allowed(std::span<const TokenId> draft) {
  std::vector<TokenSet> sets;
  constraint_->in_one_go([&] {
    settle();
    Due due = this->due();
    int ahead = 0;
    for (std::size_t i = 0;; ++i) {
      if (i > 0 && due.empty()) due = constraint_->forced();
      sets.push_back(due.empty() ? constraint_->allowed() : only(due.front()));
      if (i == draft.size() || !contains(sets.back(), draft[i])) break;
      if (!constraint_->consume(draft[i])) break;
      ++ahead;
      pop_front(due);
    }
    constraint_->roll_back(ahead);
  });
  return sets;
}

ConstrainedText::Followed ConstrainedText::follow(std::span<const TokenId> draft, TokenId open) {
  Followed followed;
  constraint_->in_one_go([&] {
    settle();
    Due due = this->due();
    while (followed.tokens.size() < draft.size()) {
      if (!followed.tokens.empty() && due.empty()) due = constraint_->forced();
      const TokenId token = due.empty() ? draft[followed.tokens.size()] : due.front();
      if (token == open) {
        if (due.empty()) break;
        fail(ErrorKind::grammar, "the text must have token {} here, the mask, which is no text",
             token);
      }
      if (!constraint_->consume(token)) break;
      followed.tokens.push_back(token);
      pop_front(due);
    }
    followed.ended = due.empty() && constraint_->forced().empty() && constraint_->ended();
    constraint_->roll_back(static_cast<int>(followed.tokens.size()));
  });
  return followed;
}

TokenSet ConstrainedText::only(TokenId token) const {
  TokenSet set((static_cast<std::size_t>(vocab_size_) + 31) / 32);
  insert(set, token);
  return set;
}

}  // namespace sbd
