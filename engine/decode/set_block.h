// Blocks of masks behind a cache: Set Block Decoding, and the families that cache.
//
// SBD's keys and values of a block saw masks, so they are never kept: the decided block runs again
// causally, in front of the next block's first forward.
//
//   first forward of a block:  [pending tokens, causal commit][block of masks, block scratch]
//   later forwards:            [block, block scratch]
//
// Where slot 0 is seeded, the pending tokens' forward stands alone: its last row predicts the seed.
#pragma once

#include <vector>

#include "decode/block_method.h"

namespace sbd {

class SetBlockDecoder final : public BlockwiseDecoder {
 public:
  SetBlockDecoder(DecodeTask task, const BlockMethod& method);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override { return task_.most_positions(block_size_); }
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  Block make_block(int begin) const;
  bool seeds() const;
  // Rows of the block that come with the last pending ones.
  int block_rows() const { return seeds() ? 0 : block_.size(); }
  int pending_rows(int budget) const;
  std::vector<Segment> commit_segments(int rows) const;
  void advance(Events& events);

  std::vector<TokenId> pending_;  // tokens the KV cache lacks: the prompt, then the last block
  bool prompt_pending_ = true;
};

}  // namespace sbd
