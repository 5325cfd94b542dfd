// Direct Multi-Token Decoding (arXiv 2510.11958): layers in three sections, encoding E, thinking T
// and decoding D. T runs for every tau-th token only, the head of a cycle; the rows it left out are
// refilled in front of the next head, as its keys and values. With e = E(embedding) and h = T(e),
//
//   logits = head(norm(D(a e + b h))),  an ordinary next-token prediction;
//   a generated head has (a, b) = (1, 1), every other generated row (1, 0).
//
//   head           [tokens since the last head, E T commit][head, E T D commit]
//   any other row  [token, E D commit]
//
// Tokens that are known come together: the prompt's, and what a grammar forces.
#pragma once

#include "core/names.h"
#include "decode/decoder.h"

namespace sbd {

enum class DmtdPromptRule {
  all_heads,  // (1, 1) on every prompt row: the released inference
  plain,      // (0, 1): the ordinary stack of layers
  train,      // heads are the positions that tau divides, in the prompt too: the training forward
};

inline constexpr Named<DmtdPromptRule> kDmtdPromptRules[] = {
    {"all_heads", DmtdPromptRule::all_heads},
    {"plain", DmtdPromptRule::plain},
    {"train", DmtdPromptRule::train},
};

struct DmtdMethod {
  int horizon = 4;  // tau
  DmtdPromptRule prompt_rule = DmtdPromptRule::all_heads;
};

class DmtdDecoder final : public Decoder {
 public:
  DmtdDecoder(DecodeTask task, const DmtdMethod& method);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override { return task_.most_positions(1); }
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  int prompt_size() const { return static_cast<int>(task_.prompt.size()); }
  int n_old() const { return static_cast<int>(waiting_.size()) - n_new_; }
  bool is_head(int position) const;
  bool thinks(int begin, int end) const;
  void append_rows(std::vector<Segment>& segments, int begin, int end) const;
  void take(std::span<const TokenId> tokens);

  DecodeTask task_;
  TextRules rules_;
  DmtdMethod method_;
  Events opening_;                // what the grammar forces before all else, not told yet
  int decided_ = 0;               // new tokens
  int in_thinking_ = 0;           // positions whose keys and values T has
  std::vector<TokenId> waiting_;  // the tokens from there on, the prompt's too
  int n_new_ = 0;                 // how many at their end no layer has seen
};

}  // namespace sbd
