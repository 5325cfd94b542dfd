#include "decode/set_block.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

SetBlockDecoder::SetBlockDecoder(DecodeTask task, int block_size, const Unmask& unmask,
                                 TokenId mask_token_id)
    : task_(std::move(task)),
      block_size_(block_size),
      unmask_(unmask),
      mask_token_id_(mask_token_id),
      pending_(task_.prompt) {
  SBD_CHECK(block_size >= 1 && block_size <= task_.n_ctx,
            "expected block_size from 1 to the context of {} tokens, got {}", task_.n_ctx,
            block_size);
  check_unmask(unmask);
  start_block(0);
}

// The last block keeps its k rows even where fewer tokens are wanted: it is conditioned as any
// other. Only the end of the context cuts it.
void SetBlockDecoder::start_block(int begin) {
  const int room = task_.n_ctx - static_cast<int>(task_.prompt.size()) - begin;
  begin_ = begin;
  block_.assign(static_cast<std::size_t>(std::min(block_size_, room)), mask_token_id_);
  end_ = std::min(static_cast<int>(block_.size()), task_.tokens_wanted() - begin);
  committed_ = 0;
  forwards_ = 0;
}

// Prompt rows that run in a forward of their own; 0 once the rest fits in front of the first block.
int SetBlockDecoder::prefill_chunk() const {
  const bool prompt_pending = begin_ == 0;
  return prompt_pending && static_cast<int>(pending_.size()) > task_.prefill_rows
             ? task_.prefill_rows
             : 0;
}

std::vector<int> SetBlockDecoder::candidates() const {
  std::vector<int> rows;
  for (int i = 0; i < end_; ++i) {
    if (block_[static_cast<std::size_t>(i)] == mask_token_id_) {
      rows.push_back(i);
    }
  }
  return rows;
}

std::vector<Segment> SetBlockDecoder::plan() {
  std::vector<Segment> segments;
  if (!pending_.empty()) {
    const int rows = prefill_chunk();
    Segment commit;
    commit.tokens.assign(pending_.begin(), rows > 0 ? pending_.begin() + rows : pending_.end());
    segments.push_back(std::move(commit));
    if (rows > 0) {
      return segments;
    }
  }
  Segment block{.tokens = block_,
                .attention = Attention::block,
                .kv = Kv::scratch,
                .outputs = candidates(),
                .sampling = task_.sampling};
  block.sampling.draw = static_cast<std::uint64_t>(forwards_);  // a masked row is drawn anew
  segments.push_back(std::move(block));
  return segments;
}

Events SetBlockDecoder::absorb(std::span<const RowStats> stats) {
  const int prefilled = prefill_chunk();
  const std::vector<int> rows = prefilled > 0 ? std::vector<int>{} : candidates();
  SBD_CHECK(stats.size() == rows.size(), "expected statistics of {} rows, got {}", rows.size(),
            stats.size());
  if (prefilled > 0) {
    pending_.erase(pending_.begin(), pending_.begin() + prefilled);
    return {};
  }
  pending_.clear();
  ++forwards_;

  Events events;
  for (const int i : select_unmasked(unmask_, stats)) {
    const int row = rows[static_cast<std::size_t>(i)];
    const TokenId token = task_.choose(stats[static_cast<std::size_t>(i)]);
    SBD_CHECK(token != mask_token_id_, "expected statistics without the mask token {}", token);
    block_[static_cast<std::size_t>(row)] = token;
    events.revealed.push_back({begin_ + row, token});
    if (task_.is_eos(token)) {
      end_ = std::min(end_, row + 1);  // what was decided behind it is cut
    }
  }

  // An EOS is decided in place of a mask, so the committed prefix never reaches beyond `end_`.
  for (; committed_ < end_; ++committed_) {
    const TokenId token = block_[static_cast<std::size_t>(committed_)];
    if (token == mask_token_id_) {
      return events;
    }
    events.committed.push_back(token);
  }
  if (task_.is_eos(block_[static_cast<std::size_t>(end_ - 1)])) {
    events.finished = FinishReason::stop;
  } else if (begin_ + end_ == task_.tokens_wanted()) {
    events.finished = FinishReason::length;
  } else {
    pending_ = block_;
    start_block(begin_ + block_size_);
  }
  return events;
}

}  // namespace sbd
