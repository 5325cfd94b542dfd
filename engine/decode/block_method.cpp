#include "decode/block_method.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

void check_block_method(const BlockMethod& method, const DecodeTask& task) {
  const bool cached = method.commit_attention != CommitAttention::none;
  SBD_CHECK(method.block_size || !cached, "expected a `block_size` with a cache, got none");
  if (method.block_size) check_block_size(*method.block_size, task);
  SBD_CHECK(method.sub_block_size.value_or(1) >= 1, "expected sub_block_size >= 1, got {}",
            *method.sub_block_size);
  SBD_CHECK(cached == (method.prompt_attention != PromptAttention::full),
            "expected commit_attention none with prompt_attention full, and with no other");
  SBD_CHECK(cached ? method.logit_shift == 0 || method.seed_slot : !method.seed_slot,
            "expected seed_slot with logit_shift 1 and a cache, and not without a cache");
  SBD_CHECK(!method.absolute_blocks || method.prompt_attention == PromptAttention::block_causal ||
                method.prompt_attention == PromptAttention::causal,
            "expected prompt_attention causal or block_causal with absolute blocks");
}

BlockwiseDecoder::BlockwiseDecoder(DecodeTask task, const BlockMethod& method)
    : task_(std::move(task)),
      rules_(task_.rules, task_.prompt),
      method_(method),
      block_size_(method.block_size.value_or(task_.tokens_wanted())),
      block_(0, 0, 0, method.mask_token_id) {
  check_block_method(method_, task_);
}

std::vector<int> BlockwiseDecoder::candidates() const {
  std::vector<int> masked = method_.past_eos ? block_.wanted_masked() : block_.masked();
  if (method_.sub_block_size && !masked.empty()) {
    const int size = *method_.sub_block_size;
    const int end = (masked.front() / size + 1) * size;
    masked.erase(std::ranges::lower_bound(masked, end), masked.end());
  }
  return masked;
}

// How many of the block's `masked` positions its next forward decides by the schedule.
int BlockwiseDecoder::scheduled(int masked) const {
  const int steps = *method_.steps;
  if (forwards_ + 1 >= steps) {
    return masked;
  }
  if (method_.schedule == Schedule::even) {
    return block_size_ / steps + (forwards_ < block_size_ % steps ? 1 : 0);
  }
  const auto time = [&](int step) { return 1.0 - step * (1.0 - 1e-3) / steps; };
  return static_cast<int>(masked * (1.0 - time(forwards_ + 1) / time(forwards_)));
}

void BlockwiseDecoder::decide(std::span<const int> candidates, std::span<const RowStats> stats,
                              Events& events) {
  Unmask unmask = method_.unmask;
  if (method_.steps) {
    const int masked = static_cast<int>(candidates.size());
    // A step that decides nothing would leave the next one the same rows: it is passed over.
    while ((unmask.top_n = scheduled(masked)) == 0) ++forwards_;
  }
  ++forwards_;
  std::vector<int> chosen = select_unmasked(unmask, stats);
  if (rules_.constrained()) {
    // What stands behind the first place is thrown away where the grammar does not allow it, so
    // that place is always decided. The text's end is the grammar's to say, there alone.
    std::erase_if(chosen, [&](int i) {
      return i == 0 || task_.is_eos(task_.choose(stats[static_cast<std::size_t>(i)]));
    });
    chosen.insert(chosen.begin(), 0);
  }
  for (const int i : chosen) {
    decide(candidates[static_cast<std::size_t>(i)], stats[static_cast<std::size_t>(i)], events);
  }
}

// Under a grammar a token is in the text once it is known that it may be.
void BlockwiseDecoder::decide(int i, const RowStats& row, Events& events) {
  block_.decide(i, row, task_, events);
  if (!rules_.constrained()) rules_.add(block_[i]);
}

}  // namespace sbd
