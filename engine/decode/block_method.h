// What the methods that decide blocks of masks, a set of positions per forward, have in common and
// differ in: Set Block Decoding (arXiv 2509.04185, Algorithms 2 and 3) and the block-diffusion
// families.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/names.h"
#include "decode/block.h"
#include "decode/decoder.h"
#include "decode/unmask.h"

namespace sbd {

enum class PromptAttention {
  causal,
  bidirectional,  // the prompt is one block
  block_causal,   // it is cut into blocks from position 0 on
  full,           // it sees all masks to the end of the text too: no cache
};

inline constexpr Named<PromptAttention> kPromptAttentions[] = {
    {"causal", PromptAttention::causal},
    {"bidirectional", PromptAttention::bidirectional},
    {"block_causal", PromptAttention::block_causal},
    {"full", PromptAttention::full},
};

enum class CommitAttention { causal, block, none };  // how a decided block's rows are cached

inline constexpr Named<CommitAttention> kCommitAttentions[] = {
    {"causal", CommitAttention::causal},
    {"block", CommitAttention::block},
    {"none", CommitAttention::none},
};

// Number of positions that a block's forwards decide, where `steps` bounds them.
enum class Schedule {
  even,    // as many in each; the first ones take the rest
  linear,  // of m masked ones floor(m (1 - s / t)), as time falls from t = 1 to .001 (Dream)
};

inline constexpr Named<Schedule> kSchedules[] = {
    {"even", Schedule::even},
    {"linear", Schedule::linear},
};

// BlockMethod's absolute_blocks.
inline constexpr Named<bool> kBlockOrigins[] = {{"prompt", false}, {"absolute", true}};

struct BlockMethod {
  TokenId mask_token_id = kMaskSlot;
  std::optional<int> block_size = kBlockSize;  // none: the whole new text
  // Only masks of the first part of this size that has any are decided; none: all.
  std::optional<int> sub_block_size = {};
  // Forwards per block that top_n is spread over; none: top_n in each.
  std::optional<int> steps = {};
  Schedule schedule = Schedule::even;
  Unmask unmask = {};
  bool past_eos = false;   // masks behind a decided end of sequence are decided too, as long as the
                           // text goes on; what they see there may change what stands before it
  int logit_shift = 0;     // 1: the row before a masked one predicts it
  bool seed_slot = false;  // the first position of a block is the cache's next-token prediction
  bool absolute_blocks = false;  // blocks begin at multiples of block_size, the first with the
                                 // prompt's last tokens; else behind the prompt
  PromptAttention prompt_attention = PromptAttention::causal;
  CommitAttention commit_attention = CommitAttention::causal;
};

// Refuses what makes no method: options that exclude each other. Their ranges are checked before.
void check_block_method(const BlockMethod& method, const DecodeTask& task);

// The decoders of such methods: what decides the positions of the block at hand.
class BlockwiseDecoder : public Decoder {
 protected:
  BlockwiseDecoder(DecodeTask task, const BlockMethod& method);

  int prompt_size() const { return static_cast<int>(task_.prompt.size()); }
  // The positions of which the next forward may decide some.
  std::vector<int> candidates() const;
  // A segment's rows over the block are drawn anew in each forward.
  std::uint64_t draw() const { return static_cast<std::uint64_t>(forwards_); }
  // Decides the one that the row predicts.
  void decide(int i, const RowStats& row, Events& events);
  // Decides what the method's rule takes of `candidates`, whose rows' statistics these are.
  void decide(std::span<const int> candidates, std::span<const RowStats> stats, Events& events);

  DecodeTask task_;
  TextRules rules_;  // of what is decided, in the block too
  BlockMethod method_;
  int block_size_;
  Block block_;
  int forwards_ = 0;  // that the block has had

 private:
  int scheduled(int masked) const;
};

}  // namespace sbd
