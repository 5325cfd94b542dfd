#include "decode/lossless.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

LosslessDecoder::LosslessDecoder(DecodeTask task, const LosslessMethod& method)
    : task_(std::move(task)),
      rules_(task_.rules, task_.prompt),
      method_(method),
      pending_(task_.prompt),
      block_(0, 0, 0, method.mask_token_id) {
  SBD_CHECK(task_.sampling.temperature == 0.0f,
            "expected `temperature` 0 with a lossless decoder, as its text is that of greedy "
            "next-token decoding, got {}",
            task_.sampling.temperature);
  check_block_size(method.block_size, task_);
  start_block();
}

void LosslessDecoder::start_block() {
  const int behind = cached_ + static_cast<int>(pending_.size());
  block_ = block_at(task_, behind - static_cast<int>(task_.prompt.size()), method_.block_size,
                    method_.mask_token_id);
}

bool LosslessDecoder::draft_ends() const {
  return drafted_ && (task_.is_eos(pending_.back()) || block_.begin() == task_.tokens_wanted());
}

// Rows of the block that come with the last pending ones, or alone where there are none.
int LosslessDecoder::block_rows() const {
  const bool comes = pending_.empty() || (method_.fused && !draft_ends());
  return comes && !candidates().empty() ? block_.size() : 0;
}

// Pending rows of the next forward: a draft, all of a prompt, or a part of a long one, which leaves
// the block some to go with.
int LosslessDecoder::pending_rows(int budget) const {
  const int all = static_cast<int>(pending_.size());
  if (drafted_) return draft_ends() ? all - 1 : all;
  if (all <= 1 || all + block_rows() <= budget) return all;
  return std::clamp(budget, 1, all - 1);
}

Sharing LosslessDecoder::sharing() const {
  return {.kind = kCausal, .most = static_cast<int>(task_.prompt.size()) - 1, .text = true};
}

void LosslessDecoder::begin_behind(int n_cached) {
  pending_.erase(pending_.begin(), pending_.begin() + n_cached);
  cached_ = n_cached;
}

Demand LosslessDecoder::demand() const {
  const int all = static_cast<int>(pending_.size());
  const int rows = pending_rows(0);
  const bool prompt = cached_ < static_cast<int>(task_.prompt.size());
  return {.least_rows = rows + (rows == all || drafted_ ? block_rows() : 0),
          .prompt_rows = prompt ? all : 0};
}

// The block's first token is never among them: the row before it predicts it.
std::vector<int> LosslessDecoder::candidates() const {
  std::vector<int> rows = block_.masked();
  std::erase(rows, 0);
  return rows;
}

Plan LosslessDecoder::plan(const Budget& budget) const {
  Plan plan{.segments = {}, .start = cached_};
  const int rows = pending_rows(budget.rows);
  const bool whole = drafted_ || rows == static_cast<int>(pending_.size());
  // Behind the text, whose newest token it begins with.
  std::span<const TokenId> draft;
  if (drafted_) draft = std::span<const TokenId>(pending_).subspan(1);
  if (rows > 0) {
    Segment commit;
    commit.tokens.assign(pending_.begin(), pending_.begin() + rows);
    // Every row of a draft is asked for the token behind it, of other rows the last one.
    for (int row = drafted_ ? 0 : rows - 1; whole && row < rows; ++row) {
      commit.outputs.push_back(row);
      if (rules_.none()) continue;
      commit.asks.push_back(rules_.ask(draft.first(drafted_ ? static_cast<std::size_t>(row) : 0)));
    }
    plan.segments.push_back(std::move(commit));
  }
  if (whole && block_rows() > 0) {
    Segment block{.tokens = block_.tokens(), .attention = Attention::block, .kv = Kv::scratch};
    block.outputs = candidates();
    block.adapted = method_.adapted;
    // Scores are those of the rows that verify.
    if (const auto rules = rules_.ask(draft).rules) {
      block.asks.assign(block.outputs.size(), {.rules = rules});
    }
    plan.segments.push_back(std::move(block));
  }
  return plan;
}

Events LosslessDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  Events events;
  bool block_ran = plan.segments.back().kv == Kv::scratch;
  if (plan.segments.front().kv == Kv::commit) {
    const std::size_t n_next = plan.segments.front().outputs.size();
    const std::span<const RowStats> next = stats.first(n_next);
    stats = stats.subspan(n_next);
    const int kept = drafted_ ? count_agreeing(next) : plan.n_committed();
    cached_ += kept;
    if (drafted_) {
      events.accepted = kept;
      for (int i = 1; i < kept; ++i) {
        accept(next[static_cast<std::size_t>(i - 1)], /*revealed=*/true, events);
      }
    }
    const bool disagreed = drafted_ && kept < static_cast<int>(pending_.size());
    pending_.erase(pending_.begin(), pending_.begin() + kept);
    if (events.finished || (!drafted_ && !pending_.empty())) {
      return events;
    }
    drafted_ = false;
    const RowStats& predicted = next[disagreed ? static_cast<std::size_t>(kept - 1) : n_next - 1];
    const TokenId token = task_.choose(predicted);
    accept(predicted, /*revealed=*/false, events);
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
    denoise(plan.segments.back().outputs, stats, events);
  }
  if (pending_.empty() && candidates().empty()) {
    pending_.assign(block_.tokens().begin(), block_.tokens().begin() + block_.end());
    drafted_ = true;
    start_block();
  }
  return events;
}

void LosslessDecoder::denoise(std::span<const int> rows, std::span<const RowStats> stats,
                              Events& events) {
  for (const int i : select_unmasked(method_.unmask, stats)) {
    block_.decide(rows[static_cast<std::size_t>(i)], stats[static_cast<std::size_t>(i)], task_,
                  events);
  }
}

int LosslessDecoder::count_agreeing(std::span<const RowStats> next) const {
  std::size_t kept = 1;
  while (kept < pending_.size() && task_.choose(next[kept - 1]) == pending_[kept]) {
    ++kept;
  }
  return static_cast<int>(kept);
}

void LosslessDecoder::accept(const RowStats& row, bool revealed, Events& events) {
  if (!revealed) {
    events.revealed.push_back(task_.reveal(accepted_, row));
  }
  task_.append(accepted_++, row, rules_, events);
}

}  // namespace sbd
