#include "decode/lossless.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

LosslessDecoder::LosslessDecoder(DecodeTask task, const LosslessMethod& method)
    : task_(std::move(task)),
      method_(method),
      pending_(task_.prompt),
      block_(0, 0, 0, method.mask_token_id) {
  SBD_CHECK(task_.sampling.temperature == 0.0f,
            "expected `temperature` 0 with a lossless decoder, as its text is that of greedy "
            "next-token decoding, got {}",
            task_.sampling.temperature);
  check_block_size(method.block_size, task_);
  check_unmask(method.unmask);
  start_block();
}

void LosslessDecoder::start_block() {
  const int behind = cached_ + static_cast<int>(pending_.size());
  block_ = block_at(task_, behind - static_cast<int>(task_.prompt.size()), method_.block_size,
                    method_.mask_token_id);
}

// A draft with which the text ends leaves its last row out: nothing asks what comes next.
int LosslessDecoder::pending_rows() const {
  const int all = static_cast<int>(pending_.size());
  if (!drafted_) {
    return std::min(all, task_.prefill_rows);
  }
  const bool ends = task_.is_eos(pending_.back()) || block_.begin() == task_.tokens_wanted();
  return ends ? all - 1 : all;
}

bool LosslessDecoder::pending_runs_whole() const {
  return pending_rows() == static_cast<int>(pending_.size());
}

int LosslessDecoder::pending_outputs() const {
  return drafted_ ? pending_rows() : pending_runs_whole();
}

bool LosslessDecoder::runs_block() const {
  return (pending_.empty() || (method_.fused && pending_runs_whole())) && !candidates().empty();
}

// The block's first token is never among them: the row before it predicts it.
std::vector<int> LosslessDecoder::candidates() const {
  std::vector<int> rows = block_.masked();
  std::erase(rows, 0);
  return rows;
}

Plan LosslessDecoder::plan() const {
  Plan plan{.segments = {}, .start = cached_};
  if (!pending_.empty()) {
    const int rows = pending_rows();
    Segment commit;
    commit.tokens.assign(pending_.begin(), pending_.begin() + rows);
    for (int row = rows - pending_outputs(); row < rows; ++row) {
      commit.outputs.push_back(row);
    }
    plan.segments.push_back(std::move(commit));
  }
  if (runs_block()) {
    Segment block{.tokens = block_.tokens(), .attention = Attention::block, .kv = Kv::scratch};
    block.outputs = candidates();
    block.adapted = method_.adapted;
    plan.segments.push_back(std::move(block));
  }
  return plan;
}

Events LosslessDecoder::absorb(std::span<const RowStats> stats) {
  bool block_ran = runs_block();
  const auto n_next = static_cast<std::size_t>(pending_.empty() ? 0 : pending_outputs());
  const std::size_t expected = n_next + (block_ran ? candidates().size() : 0);
  check_rows(stats, expected);
  Events events;
  if (!pending_.empty()) {
    const std::span<const RowStats> next = stats.first(n_next);
    const int kept = drafted_ ? count_agreeing(next) : pending_rows();
    cached_ += kept;
    if (drafted_) {
      events.accepted = kept;
      for (int i = 1; i < kept; ++i) {
        accept(pending_[static_cast<std::size_t>(i)], /*predicted=*/nullptr, events);
      }
    }
    const bool disagreed = drafted_ && kept < static_cast<int>(pending_.size());
    pending_.erase(pending_.begin(), pending_.begin() + kept);
    if (events.finished || (!drafted_ && !pending_.empty())) {
      return events;
    }
    drafted_ = false;
    const RowStats& row = next[disagreed ? static_cast<std::size_t>(kept - 1) : n_next - 1];
    const TokenId token = row.argmax;
    accept(token, &row, events);
    if (disagreed) {
      pending_.clear();
      if (method_.fused) {
        pending_.push_back(token);
      }
      start_block();
    }
    if (pending_.empty()) {
      block_.fill(0, token);
    }
    if (events.finished) {
      return events;
    }
    block_ran = block_ran && !disagreed;
  }
  if (block_ran) {
    denoise(stats.subspan(n_next), events);
  }
  if (pending_.empty() && candidates().empty()) {
    pending_.assign(block_.tokens().begin(), block_.tokens().begin() + block_.end());
    drafted_ = true;
    start_block();
  }
  return events;
}

void LosslessDecoder::denoise(std::span<const RowStats> stats, Events& events) {
  const std::vector<int> rows = candidates();
  for (const int i : select_unmasked(method_.unmask, stats)) {
    block_.decide(rows[static_cast<std::size_t>(i)], stats[static_cast<std::size_t>(i)], task_,
                  events);
  }
}

int LosslessDecoder::count_agreeing(std::span<const RowStats> next) const {
  std::size_t kept = 1;
  while (kept < pending_.size() && next[kept - 1].argmax == pending_[kept]) {
    ++kept;
  }
  return static_cast<int>(kept);
}

void LosslessDecoder::accept(TokenId token, const RowStats* predicted, Events& events) {
  if (predicted) {
    events.revealed.push_back(task_.reveal(accepted_, *predicted));
  }
  events.committed.push_back(token);
  ++accepted_;
  events.finished = task_.finish(token, accepted_);
}

}  // namespace sbd
