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

  Plan plan() const override;
  Events absorb(std::span<const RowStats> stats) override;

 private:
  int pending_rows() const;
  bool pending_runs_whole() const;
  int pending_outputs() const;
  bool runs_block() const;
  std::vector<int> candidates() const;
  void start_block();
  // How many tokens of the draft are next-token decoding's own, `next` being its rows' statistics.
  int count_agreeing(std::span<const RowStats> next) const;
  // The text's next token; `predicted`: its row, where no block has revealed it.
  void accept(TokenId token, const RowStats* predicted, Events& events);
  void denoise(std::span<const RowStats> stats, Events& events);

  DecodeTask task_;
  LosslessMethod method_;
  std::vector<TokenId> pending_;  // tokens the KV cache lacks
  bool drafted_ = false;          // they are a decided block, its first token known to be right
  Block block_;                   // behind them
  int cached_ = 0;                // positions
  int accepted_ = 0;              // tokens of the text
};

}  // namespace sbd
