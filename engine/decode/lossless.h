// Set Block Decoding whose text is that of greedy next-token decoding, whatever the unmasking rule:
// the forward that commits a decided block causally gives the next-token logits of each of its
// rows, so the block is kept as far as they agree, and the text goes on with what they predict.
//
//   fused      [pending tokens, causal commit][block of masks, block scratch]
//              pending: the prompt, a decided block to verify, or the correction of one. Its last
//              row predicts the block's first token, which is so no guess. Where the rows disagree
//              with the decided block, what the masks behind it decided is dropped.
//   separate   [block, causal commit] alone, then [known token and masks, block scratch]:
//              Nemotron-Labs-Diffusion's linear self-speculation, whose draft may run with the
//              model's adapter.
//
// The last block is verified in a forward of its own.
#pragma once

#include "decode/block.h"
#include "decode/decoder.h"
#include "decode/unmask.h"

namespace sbd {

struct LosslessMethod {
  TokenId mask_token_id = 0;
  int block_size = kBlockSize;
  Unmask unmask;
  bool fused = true;
  bool adapted = false;  // blocks of masks run with the adapter
};

class LosslessDecoder final : public Decoder {
 public:
  LosslessDecoder(DecodeTask task, const LosslessMethod& method);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override { return task_.most_positions(method_.block_size); }
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  // Whether the text ends with the draft: nothing asks what comes behind its last row.
  bool draft_ends() const;
  int block_rows() const;
  int pending_rows(int budget) const;
  std::vector<int> candidates() const;
  void start_block();
  // How many tokens of the draft are next-token decoding's own, `next` being its rows' statistics.
  int count_agreeing(std::span<const RowStats> next) const;
  // The text's next token, by the row that predicts it; `revealed`: a block has shown it before.
  void accept(const RowStats& row, bool revealed, Events& events);
  // `rows`: the block's positions whose statistics these are.
  void denoise(std::span<const int> rows, std::span<const RowStats> stats, Events& events);

  DecodeTask task_;
  TextRules rules_;
  LosslessMethod method_;
  std::vector<TokenId> pending_;  // tokens the KV cache lacks
  bool drafted_ = false;          // they are a decided block, its first token known to be right
  Block block_;                   // behind them
  int cached_ = 0;                // positions
  int accepted_ = 0;              // tokens of the text
};

}  // namespace sbd
