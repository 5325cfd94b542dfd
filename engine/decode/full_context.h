// Blocks of masks without a cache (LLaDA, Dream): every forward is one block over the prompt, the
// text and all masks to its end.
#pragma once

#include <vector>

#include "decode/block_method.h"

namespace sbd {

class FullContextDecoder final : public BlockwiseDecoder {
 public:
  FullContextDecoder(DecodeTask task, const BlockMethod& method);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override { return task_.most_positions(1); }
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  Block make_block(int begin) const;
  // The row that predicts the block's first position.
  int first_row() const { return prompt_size() + block_.begin() - method_.logit_shift; }

  std::vector<TokenId> text_;  // before the block
};

}  // namespace sbd
