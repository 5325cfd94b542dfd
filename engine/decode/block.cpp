#include "decode/block.h"

#include <algorithm>

#include "core/error.h"

namespace sbd {

Block::Block(int begin, int size, int end, TokenId mask_token_id)
    : begin_(begin),
      wanted_(end),
      end_(end),
      committed_(std::max(0, -begin)),
      mask_token_id_(mask_token_id),
      tokens_(static_cast<std::size_t>(size), mask_token_id),
      scores_(static_cast<std::size_t>(size)) {}

std::vector<int> Block::masked() const { return masked_before(end_); }
std::vector<int> Block::wanted_masked() const { return masked_before(wanted_); }
std::vector<int> Block::all_masked() const { return masked_before(size()); }

std::vector<int> Block::masked_before(int end) const {
  std::vector<int> masked;
  for (int i = 0; i < end; ++i) {
    if (is_masked(i)) {
      masked.push_back(i);
    }
  }
  return masked;
}

void Block::decide(int i, const RowStats& row, const DecodeTask& task, Events& events) {
  const Reveal reveal = task.reveal(begin_ + i, row);
  SBD_CHECK(reveal.token != mask_token_id_, "expected statistics without the mask token {}",
            reveal.token);
  fill(i, reveal.token);
  scores_[static_cast<std::size_t>(i)] = row.scores;
  events.revealed.push_back(reveal);
  if (task.is_eos(reveal.token)) {
    end_ = std::min(end_, i + 1);
  }
}

void Block::mask_from(int i) {
  for (; i < size(); ++i) {
    fill(i, mask_token_id_);
    scores_[static_cast<std::size_t>(i)] = nullptr;
  }
}

// An EOS is decided in place of a mask, so what was given out never reaches beyond the end.
bool Block::commit(const DecodeTask& task, Events& events) {
  for (; committed_ < end_; ++committed_) {
    if (is_masked(committed_)) {
      return false;
    }
    events.committed.push_back((*this)[committed_]);
    if (const auto& scores = scores_[static_cast<std::size_t>(committed_)]) {
      events.scores.push_back(scores);
    }
  }
  if (end_ > 0) events.finished = task.finish((*this)[end_ - 1], begin_ + end_);
  return true;
}

Block block_at(const DecodeTask& task, int begin, int block_size, TokenId mask_token_id) {
  const int room = task.n_ctx - static_cast<int>(task.prompt.size()) - begin;
  const int size = std::min(block_size, room);
  return {begin, size, std::min(size, task.tokens_wanted() - begin), mask_token_id};
}

void check_block_size(int block_size, const DecodeTask& task) {
  SBD_CHECK(block_size >= 1 && block_size <= task.n_ctx,
            "expected `block_size` from 1 to the context of {} tokens, got {}", task.n_ctx,
            block_size);
}

}  // namespace sbd
