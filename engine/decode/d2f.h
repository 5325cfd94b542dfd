// Discrete Diffusion Forcing (arXiv 2508.09192): several blocks of masks in flight. The prompt is
// one block; block b sees the prompt, the blocks before it and itself. One step:
//
//   1. append a block of masks once `block_add_threshold` of the last one is decided, while there
//      is no end of sequence and the text wants more;
//   2. a block becomes activated, for good, once `decoded_token_threshold` of the one before it is;
//   3. [decided blocks with none undecided before them, block commit][all others, block scratch];
//   4. decide every masked position whose token's probability is above `skip_threshold`; an
//      activated block where there is none decides its best.
//
// With logit_shift 1 (Dream) the row before a position predicts it. The first undecided block's
// first position reads the newest cached row, from the forward that cached it.
#pragma once

#include "decode/block.h"
#include "decode/decoder.h"

namespace sbd {

struct D2fMethod {
  TokenId mask_token_id = 0;
  int block_size = kBlockSize;
  int logit_shift = 0;
  float block_add_threshold = 0.1f;
  float decoded_token_threshold = 0.95f;
  float skip_threshold = 0.9f;
};

class D2fDecoder final : public Decoder {
 public:
  D2fDecoder(DecodeTask task, const D2fMethod& method);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override { return task_.most_positions(method_.block_size); }
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  struct Flight {
    Block block;
    bool activated = false;
    bool decided = false;  // with all blocks before it: the next forward caches it
    int forwards = 0;
  };
  float probability(const RowStats& row) const;
  std::vector<int> outputs(std::size_t index) const;
  void decide(Flight& flight, std::span<const RowStats> stats, Events& events);
  void prepare_step();

  DecodeTask task_;
  TextRules rules_;  // of what is decided, in every block
  D2fMethod method_;
  bool prompt_pending_ = true;
  std::vector<Flight> flights_;  // the blocks that are not cached, in order
  int next_begin_ = 0;           // of the next block, in the new text
  bool ended_ = false;           // an end of sequence is decided
  RowStats kept_;                // of the newest cached row, where logits are shifted
};

}  // namespace sbd
