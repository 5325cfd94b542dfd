// Set Block Decoding (arXiv 2509.04185, Algorithms 2 and 3): a block of masks is decided a set of
// positions per forward. Its keys and values saw masks, so they are never kept: the decided block
// runs again causally, in front of the next block's first forward.
//
//   first forward of a block:  [pending tokens, causal commit][block of masks, block scratch]
//   later forwards:            [block, block scratch]
#pragma once

#include "decode/decoder.h"
#include "decode/unmask.h"

namespace sbd {

class SetBlockDecoder final : public Decoder {
 public:
  SetBlockDecoder(DecodeTask task, int block_size, const Unmask& unmask, TokenId mask_token_id);

  std::vector<Segment> plan() override;
  Events absorb(std::span<const RowStats> stats) override;

 private:
  void start_block(int begin);
  int prefill_chunk() const;
  std::vector<int> candidates() const;

  DecodeTask task_;
  int block_size_;
  Unmask unmask_;
  TokenId mask_token_id_;

  std::vector<TokenId> pending_;  // tokens the KV cache lacks: the prompt, then the last block
  std::vector<TokenId> block_;    // the mask token where nothing is decided
  int begin_ = 0;                 // the block's first position in the new text
  int end_ = 0;                   // block positions from here on are not in the text
  int committed_ = 0;             // the block's tokens already given out, a prefix
  int forwards_ = 0;              // that the block has had
};

}  // namespace sbd
