// What a decoder asks of a forward and what it gets back. Every decoding method here is the same
// forward over rows (token positions), and a row's attention is one integer: how many keys it sees,
// but where blocks go on from within others (Segment::begin).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/types.h"

namespace sbd {

enum class Attention {
  causal,  // a row at position p sees the keys [0, p + 1)
  block,   // every row sees the keys [0, end of its segment)
};

enum class Kv {
  commit,   // the rows' keys and values are kept: the cache grows
  scratch,  // they are overwritten by the sequence's next forward
};

// How a token is drawn at a row: temperature, then top-k, then top-p, then min-p, then Gumbel-max.
// The noise is that of the position before the one that the row decides, so a mask and the row that
// predicts what stands there draw alike.
struct Sampling {
  float temperature = 0.0f;  // 0: the argmax
  int top_k = 0;             // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;  // of the highest probability: less probable tokens are left out
  std::uint64_t seed = 0;
  std::uint64_t sample_index = 0;  // which sample of its own request, never a batch slot
  std::uint64_t draw = 0;          // other noise for what has been drawn before
};

// Direct Multi-Token Decoding (arXiv 2510.11958) cuts a model's layers into three sections:
// encoding, thinking, decoding. Every row goes through the first; any other model is one.
enum class Layers {
  all,
  refill,  // encoding and thinking: the row's keys and values there, for the rows behind it
  skip,    // encoding and decoding
};

// A change of one token's logit l: l + bias; that divided by `factor` where it is positive, else
// multiplied by it; and `penalty` off.
struct Adjustment {
  TokenId token;
  float bias = 0.0f;
  float factor = 1.0f;
  float penalty = 0.0f;
};

using TokenSet = std::vector<std::uint32_t>;  // a bit per token

inline void insert(TokenSet& set, TokenId token) {
  set[static_cast<std::size_t>(token) / 32] |= 1u << (token % 32);
}

inline bool contains(const TokenSet& set, TokenId token) {
  const auto word = static_cast<std::size_t>(token) / 32;
  return token >= 0 && word < set.size() && (set[word] >> (token % 32) & 1u) != 0;
}

// What a row's statistics and its token are taken under.
struct LogitRules {
  std::vector<Adjustment> adjustments = {};  // ascending by token
  TokenSet allowed = {};                     // empty: all are allowed
};

// What is asked of a row beyond its statistics.
struct RowAsk {
  std::shared_ptr<const LogitRules> rules = {};  // none: as the model says
  int n_best = -1;     // so many best tokens and their log-probabilities; -1: no scores at all
  TokenId given = -1;  // whose log-probability and rank are wanted; -1: those of the row's token
};

// Log-probabilities of the model's own distribution: over the whole vocabulary, untempered, without
// any rule.
struct TokenScore {
  TokenId token;
  float logprob;
};

struct RowScores {
  TokenScore token;              // the given one, else the one that the row decides
  int rank;                      // of a given one: the more probable tokens; ties: the lower id
  std::vector<TokenScore> best;  // the most probable first; ties: the lower id
};

// Consecutive positions of one sequence. A commit segment never follows a scratch segment.
struct Segment {
  std::vector<TokenId> tokens;
  Attention attention = Attention::causal;
  Kv kv = Kv::commit;
  std::vector<int> outputs = {};  // ascending indices into tokens: rows whose statistics are wanted
  // How far behind its row the token stands that a row decides: 1 the next one's, 0 in its place.
  int decides = 1;
  Sampling sampling = {};
  std::vector<RowAsk> asks = {};  // one for each output; none: nothing is asked beyond statistics
  Layers layers = Layers::all;
  // What the decoding section reads: e_factor e + h_factor h, of what left the two before it.
  float e_factor = 0.0f;
  float h_factor = 1.0f;
  // The model's adapter is added, and its mask, where it has one, is what masked slots are embedded
  // as. Of scratch segments alone.
  bool adapted = false;
  // Position of its first row, where it does not stand behind the segments before it but goes on
  // from within them: its rows see the keys before that position, and their own alone. Of scratch
  // segments alone, with no other kind behind them.
  std::optional<int> begin = {};
};

// What one sequence wants of a forward. Segments follow each other; where the next one goes through
// a section of layers that rows before it left out, its rows there continue what is cached.
struct Plan {
  std::vector<Segment> segments;
  // Position of the first row: what is cached from there on is forgotten. Unset: the first
  // position that is not cached.
  std::optional<int> start = {};
  // Called once the layers are under way and before the head is: what takes a while to say of the
  // rows' rules is said here. A forward that is tried again calls it again.
  std::function<void()> before_head = {};

  int n_rows() const;
  int n_outputs() const;
  int n_committed() const;  // rows of commit segments
};

// Statistics of one row's distribution, over the vocabulary without the mask token, untempered and
// under its rules.
struct RowStats {
  TokenId argmax = 0;             // ties: the lowest id
  float top_probability = 0;      // softmax probability of the argmax
  float margin = 0;               // top_probability minus the second highest
  float log_z = 0;                // log of the sum of exp(logit)
  float entropy = 0;              // nats, never negative
  TokenId sampled = 0;            // the argmax at temperature 0
  float sampled_probability = 0;  // under the filtered, tempered distribution it was drawn from
  std::shared_ptr<const RowScores> scores = {};  // where they were asked for

  bool operator==(const RowStats&) const = default;
};

inline int Plan::n_rows() const {
  int n = 0;
  for (const Segment& segment : segments) n += static_cast<int>(segment.tokens.size());
  return n;
}

inline int Plan::n_outputs() const {
  int n = 0;
  for (const Segment& segment : segments) n += static_cast<int>(segment.outputs.size());
  return n;
}

inline int Plan::n_committed() const {
  int n = 0;
  for (const Segment& segment : segments) {
    if (segment.kv == Kv::commit) n += static_cast<int>(segment.tokens.size());
  }
  return n;
}

}  // namespace sbd
