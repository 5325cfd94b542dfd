// A decoder is a pure state machine: plan() says which rows the next forward computes, absorb()
// takes that plan back with its rows' statistics and decides tokens. It never sees a tensor, a
// backend or a file.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/names.h"
#include "core/types.h"
#include "decode/forward_costs.h"
#include "decode/text_rules.h"

namespace sbd {

enum class FinishReason {
  stop,       // an end-of-sequence token was decided
  complete,   // behind the text its grammar allows only an end
  length,     // max_tokens or the context is full
  cancelled,  // whoever reads it wanted no more: no decoder says so
};

// A token decided at a position of the new text (0 is the first position after the prompt). With
// several positions decided out of order, revealed ones may lie beyond the committed prefix.
struct Reveal {
  int position;
  TokenId token;
  float entropy = 0;      // nats, of the row that decided it
  float probability = 0;  // of the token, in the distribution it was taken from
};

// A forward of a lossless decoder: it decides the text's next token, with a draft behind the text
// verified, begun or refined, or both.
enum class ForwardKind { next_token, draft, verify, verify_and_draft };

inline constexpr Named<ForwardKind> kForwardKinds[] = {
    {"next_token", ForwardKind::next_token},
    {"draft", ForwardKind::draft},
    {"verify", ForwardKind::verify},
    {"verify_and_draft", ForwardKind::verify_and_draft},
};

struct Events {
  std::vector<Reveal> revealed;
  std::vector<TokenId> committed;  // the text's next tokens, final; a closing EOS included
  std::optional<FinishReason> finished;
  // Of the committed tokens, where log-probabilities are wanted: by the row that decided each.
  std::vector<std::shared_ptr<const RowScores>> scores = {};
  // Tokens that a verifying forward found to be next-token decoding's own, the first among them,
  // which was no guess. Such a forward is an NFE even where it reveals nothing new.
  std::optional<int> accepted = {};
  int guesses = 0;  // that it verified
  std::optional<ForwardKind> kind = {};
  bool ran_thinking = false;  // DMTD: the forward ran the thinking layers
};

// What every decoder needs to know about its task.
struct DecodeTask {
  std::vector<TokenId> prompt;         // at least one token, fewer than n_ctx
  int max_tokens = 256;                // new tokens wanted, at least 1
  int n_ctx = 0;                       // positions the KV cache has room for
  int n_ctx_limit = 0;                 // to which n_ctx could be raised
  int sliding_window = 0;              // where that is the limit, else 0
  std::vector<TokenId> eos_token_ids;  // empty: end-of-sequence tokens are ordinary ones
  Sampling sampling;
  RuleOptions rules = {};

  // New tokens that both max_tokens and the context allow.
  int tokens_wanted() const;
  // Positions of the cache that they may need, the last of them in a block of `block_size`.
  int most_positions(int block_size) const;
  bool is_eos(TokenId token) const;
  // Why the text ends with `token`, its `count`-th one, where it does.
  std::optional<FinishReason> finish(TokenId token, int count) const;
  // The token a row decides: its argmax at temperature 0, else the sampled one.
  TokenId choose(const RowStats& row) const;
  // That the row decides its token for this position.
  Reveal reveal(int position, const RowStats& row) const;
  // Commits the row's token as the text's next one, which stands at this position.
  void append(int position, const RowStats& row, TextRules& text_rules, Events& events) const;
  // Commits what is forced from this position on, where the text goes on at all; how much it was.
  int append_forced(int position, TextRules& text_rules, Events& events) const;
};

// Refuses statistics of another number of rows than the plan wanted.
void check_rows(const Plan& plan, std::span<const RowStats> stats);

// How to mend what is too long for a context of n_ctx positions, and why it is no longer.
std::string how_to_fit(int n_ctx, int n_ctx_limit, int sliding_window);

// Refuses a task outside the ranges above, its sampling included.
void check_task(const DecodeTask& task);

// What a decoder can do with the next forward.
struct Demand {
  int least_rows;   // that must come together: a plan has as many, whatever the budget
  int prompt_rows;  // of the prompt that the cache lacks; 0: the sequence decodes
};

// What a forward has for one sequence.
struct Budget {
  int rows = 512;       // a longer prompt comes in parts
  RowPrice price = {};  // of those that it could do without
};

// Which of a sequence's cached positions are what another one's prompt would put there.
struct Sharing {
  std::string kind;   // sequences of one kind agree; empty: none do
  int unit = 1;       // they come in multiples of so many
  int most = 0;       // of the prompt that this sequence can begin behind
  bool text = false;  // it leaves those of the new text too, not the prompt's alone
};

// Sharing's kind where every position is cached as next-token decoding caches it.
inline constexpr const char* kCausal = "causal";

class Decoder {
 public:
  virtual ~Decoder() = default;

  virtual Sharing sharing() const = 0;
  // The cache begins with the first `n_cached` tokens of the prompt, as sharing() allows. Called
  // before the first plan, if at all.
  virtual void begin_behind(int n_cached) = 0;
  // Positions of the cache that the text may come to need.
  virtual int most_positions() const = 0;

  virtual Demand demand() const = 0;

  // The rows of the next forward: as many as the budget has, and the least that must come together.
  virtual Plan plan(const Budget& budget) const = 0;

  // Takes the plan that ran and the statistics of every row that it wanted, in order. A forward
  // with revealed positions is one NFE (number of function evaluations). Once finished, neither is
  // called again.
  virtual Events absorb(const Plan& plan, std::span<const RowStats> stats) = 0;
};

}  // namespace sbd
