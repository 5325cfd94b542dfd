// Set Block Decoding whose text is next-token decoding's, whatever the unmasking rule and at any
// temperature: the forward that commits a decided block causally gives the next-token logits of
// each of its rows, so the block is kept as far as their tokens agree, and the text goes on with
// what they decide. Rows draw with the noise of the position that they decide, a mask and the row
// that verifies it alike.
//
//   [pending tokens, causal commit][block of masks, block scratch]
//              pending: the prompt, a decided block to verify, or the one token that is known. Its
//              last row decides the block's first token, which is so no guess. Where the rows
//              disagree with the decided block, what the masks behind it decided is dropped.
//   [pending tokens, causal commit][block of masks, block scratch][block of masks, ...] ...
//              a block behind each token of the draft, as it may be the last one that agrees:
//              whichever is, what stands behind it is drafted by then. Not where the draft would
//              end the text, nor where there is no room.
//   [pending tokens, causal commit]
//              verified alone, or next-token decoding
//   [known token and masks, block scratch]
//              Nemotron-Labs-Diffusion's linear self-speculation verifies alone and drafts behind a
//              token that is known.
//
// Blocks of masks may run with the model's adapter, which then has no part in the text.
// How long a block is, and whether it is verified alone, the policy says.
#pragma once

#include <memory>
#include <optional>

#include "decode/block.h"
#include "decode/decoder.h"
#include "decode/draft_policy.h"
#include "decode/unmask.h"

namespace sbd {

struct LosslessMethod {
  TokenId mask_token_id = kMaskSlot;
  int block_size = kBlockSize;
  Unmask unmask;
  bool fused = true;     // else a draft begins with the known token, and is verified alone
  bool adapted = false;  // blocks of masks run with the adapter
  // What blocks of other sizes and rules go by; none: the size and the rule are kept.
  std::shared_ptr<DraftHistory> history = {};
  bool rule_kept = false;
  Begins begins = Begins::fused;  // without a history
};

class LosslessDecoder final : public Decoder {
 public:
  LosslessDecoder(DecodeTask task, const LosslessMethod& method);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override;
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  // Whether the text ends with the draft: nothing asks what comes behind its last row.
  bool draft_ends() const;
  // The position behind what is cached and pending.
  int behind() const;
  // The block that a draft would be, so many tokens before what is pending ends, its first token
  // the known one where it begins with that.
  Block next_block(int size, int before = 0) const;
  // The next block, where it comes with the pending tokens or, drafted behind the known token, in
  // their place; several where it may be any of them, each a token further in front.
  std::vector<Block> next_drafts(const Budget& budget) const;
  std::vector<Block> blocks(const Budget& budget) const;  // of the next forward
  bool drafts_behind_known() const;
  int pending_rows(int budget, int block_rows) const;
  // How many tokens of the draft are next-token decoding's own, `next` being its rows' statistics.
  std::size_t count_agreeing(std::span<const RowStats> next) const;
  std::size_t commit(const Plan& plan, std::span<const RowStats> next, Events& events);
  void begin_block(const Segment& masks, TokenId first);
  // The text's next token, by the row that predicts it; `revealed`: a block has shown it before.
  void accept(const RowStats& row, bool revealed, Events& events);
  // Takes the statistics of a block's rows; once it is decided it is the draft.
  void denoise(const Segment& masks, std::span<const RowStats> stats, Events& events);

  DecodeTask task_;
  TextRules rules_;
  LosslessMethod method_;
  DraftPolicy policy_;
  std::vector<TokenId> pending_;  // tokens the KV cache lacks; none: the block is on its way
  bool drafted_ = false;          // they are a draft, its first token known to be right
  bool completes_ = false;        // the text's grammar lets nothing stand behind the draft
  bool in_vain_ = false;          // none of the last draft's guesses may stand
  Block block_;
  Draft draft_ = {};  // what the block, or the draft that it became, was to be
  int forwards_ = 0;  // that it has had
  int cached_ = 0;    // positions
  int accepted_ = 0;  // tokens of the text
  Events opening_;    // what it begins with, whatever the model says
};

}  // namespace sbd
