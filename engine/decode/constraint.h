// What a text must be, in tokens alone: a grammar says which of them may come next. Nobody here
// knows what the grammar is of, or what a token spells.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "core/batch.h"

namespace sbd {

// How far one text has come in its grammar.
class Constraint {
 public:
  virtual ~Constraint() = default;
  // The tokens that may come next; ends of sequence are among them where the text may end.
  virtual TokenSet allowed() = 0;
  // The text goes on with the token, if it may.
  virtual bool consume(TokenId token) = 0;
  // As if the last n tokens had not come.
  virtual void roll_back(int n) = 0;
  // What comes next whatever a model says, in the tokenizer's own split of it.
  virtual std::vector<TokenId> forced() = 0;
  // Whether only an end is possible.
  virtual bool ended() = 0;
  // Calls fn, which calls the others many times.
  virtual void in_one_go(const std::function<void()>& fn) { fn(); }
};

class Grammar {
 public:
  virtual ~Grammar() = default;
  virtual std::string_view name() const = 0;  // of the argument that it came as
  virtual int vocab_size() const = 0;
  virtual std::unique_ptr<Constraint> begin() const = 0;
};

// One text under a constraint. What is forced comes as a whole: once its first token stands, the
// others are due, so that every decoder splits it alike, by however many tokens it goes on at once.
class ConstrainedText {
 public:
  explicit ConstrainedText(const Grammar& grammar);

  // The text's next token. An end of sequence is none of the grammar's.
  void add(TokenId token) { added_.push_back(token); }
  // What comes next whatever a model says.
  std::vector<TokenId> forced();
  bool ended();
  // Tokens allowed behind the text, then behind each token of the draft as far as it is allowed.
  std::vector<TokenSet> allowed(std::span<const TokenId> draft);

  struct Followed {
    std::vector<TokenId> tokens;
    bool ended = false;  // the text ends with them
  };
  // The draft as the grammar lets it be: what is forced in its place, cut before the first token
  // that is not allowed, or that is `open`: a place where nothing is decided. No token of any text,
  // though it may spell one: an error where it is forced.
  Followed follow(std::span<const TokenId> draft, TokenId open = -1);

 private:
  using Due = std::vector<TokenId>;
  // Consumes what was added.
  void settle();
  // Finds out what is due behind the text, and whether it can only end.
  void look();
  // What is due behind the text.
  const Due& due();
  TokenSet only(TokenId token) const;

  std::unique_ptr<Constraint> constraint_;
  int vocab_size_;
  std::vector<TokenId> added_;  // and not consumed
  // Of what stands behind the text; none: not known.
  std::optional<Due> due_;
  std::optional<bool> ended_;
};

}  // namespace sbd
