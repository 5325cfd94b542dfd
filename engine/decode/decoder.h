// A decoder is a pure state machine: plan() says which rows the next forward computes, absorb()
// takes their statistics and decides tokens. It never sees a tensor, a backend or a file.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/types.h"
#include "model/batch.h"

namespace sbd {

enum class FinishReason {
  stop,    // an end-of-sequence token was decided
  length,  // max_tokens or the context is full
};

// A token decided at a position of the new text (0 is the first position after the prompt). With
// several positions decided out of order, revealed ones may lie beyond the committed prefix.
struct Reveal {
  int position;
  TokenId token;
  float entropy = 0;      // nats, of the row that decided it
  float probability = 0;  // of the token, in the distribution it was taken from
};

struct Events {
  std::vector<Reveal> revealed;
  std::vector<TokenId> committed;  // the text's next tokens, final; a closing EOS included
  std::optional<FinishReason> finished;
  // Tokens that a verifying forward found to be next-token decoding's own. Such a forward is an NFE
  // even where it reveals nothing new.
  std::optional<int> accepted = {};
  bool thought = false;  // DMTD: the forward ran the thinking layers
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
  // Prompt rows per forward at most: they bound the activations' memory and how long Ctrl-C waits.
  int prefill_rows = 512;

  // New tokens that both max_tokens and the context allow.
  int tokens_wanted() const;
  bool is_eos(TokenId token) const;
  // Why the text ends with `token`, its `count`-th one, where it does.
  std::optional<FinishReason> finish(TokenId token, int count) const;
  // The token a row decides: its argmax at temperature 0, else the sampled one.
  TokenId choose(const RowStats& row) const;
  // That the row decides its token for this position.
  Reveal reveal(int position, const RowStats& row) const;
};

// Refuses statistics of another number of rows than the plan wanted.
void check_rows(std::span<const RowStats> stats, std::size_t expected);

// How to mend what is too long for a context of n_ctx positions, and why it is no longer.
std::string how_to_fit(int n_ctx, int n_ctx_limit, int sliding_window);

// Refuses a task outside the ranges above, its sampling included.
void check_task(const DecodeTask& task);

class Decoder {
 public:
  virtual ~Decoder() = default;

  // The rows of the next forward.
  virtual Plan plan() const = 0;

  // Takes the statistics of every wanted row of the last plan, in order. A forward with revealed
  // positions is one NFE (number of function evaluations). Once finished, neither is called again.
  virtual Events absorb(std::span<const RowStats> stats) = 0;
};

}  // namespace sbd
