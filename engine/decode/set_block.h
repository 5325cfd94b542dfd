// Blocks of masks, a set of positions decided per forward: Set Block Decoding (arXiv 2509.04185,
// Algorithms 2 and 3), and the block-diffusion families, which differ in what BlockMethod says.
//
// SBD's keys and values of a block saw masks, so they are never kept: the decided block runs again
// causally, in front of the next block's first forward.
//
//   first forward of a block:  [pending tokens, causal commit][block of masks, block scratch]
//   later forwards:            [block, block scratch]
//
// Where slot 0 is seeded, the pending tokens' forward stands alone: its last row predicts the seed.
// Without a cache every forward is one block over prompt, text and all masks to the end.
#pragma once

#include <optional>
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
  TokenId mask_token_id = 0;
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

// Refuses what makes no method: ranges, and options that exclude each other.
void check_block_method(const BlockMethod& method, const DecodeTask& task);

class SetBlockDecoder final : public Decoder {
 public:
  SetBlockDecoder(DecodeTask task, const BlockMethod& method);

  Plan plan() const override;
  Events absorb(std::span<const RowStats> stats) override;

 private:
  bool cached() const { return method_.commit_attention != CommitAttention::none; }
  int prompt_size() const { return static_cast<int>(task_.prompt.size()); }
  Block make_block(int begin) const;
  int pending_rows() const;
  bool pending_runs_whole() const;
  bool commits_alone() const;
  bool seeds() const;
  std::vector<Segment> commit_segments(int rows) const;
  Segment uncached_segment() const;
  std::vector<int> candidates() const;
  int scheduled(int masked) const;
  void advance(Events& events);

  DecodeTask task_;
  BlockMethod method_;
  int block_size_;
  std::vector<TokenId> pending_;  // tokens the KV cache lacks: the prompt, then the last block
  std::vector<TokenId> text_;     // before the block, where nothing is cached
  Block block_;
  bool prompt_pending_ = true;
  int forwards_ = 0;  // that the block has had, or the one before where a seed is next
};

}  // namespace sbd
