// Blocks of masks behind a cache: Set Block Decoding, and the families that cache.
//
// SBD's keys and values of a block saw masks, so they are never kept: the decided block runs again
// causally, in front of the next block's first forward.
//
//   first forward of a block:  [pending tokens, causal commit][block of masks, block scratch]
//   later forwards:            [block, block scratch]
//
// Where slot 0 is seeded, the pending tokens' forward stands alone: its last row predicts the seed.
//
// A grammar's state is known at the text's end alone, so the row of the first mask decides under
// it, all others freely. What they decide is taken into the text from the left, as far as the
// grammar allows it; at the first token that it does not, that and all behind it is masked again.
// What it forces is put in, so that blocks which are forced wholly pass without a forward.
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
  int block_rows() const;
  int pending_rows(int budget) const;
  std::vector<Segment> commit_segments(int rows) const;
  // Takes over what the grammar allows of what stands in the block behind the text, and forces
  // there.
  void settle(Events& events);
  void advance(Events& events);
  bool joins_pending() const;

  std::vector<TokenId> pending_;  // tokens the KV cache lacks: the prompt, then the last blocks
  bool prompt_pending_ = true;
  int settled_ = 0;  // positions of the block that a grammar has let into the text
  Events opening_;   // what the text begins with, whatever the model says
};

}  // namespace sbd
