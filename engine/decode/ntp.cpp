#include "decode/ntp.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

NtpDecoder::NtpDecoder(DecodeTask task)
    : task_(std::move(task)), rules_(task_.rules, task_.prompt), pending_(task_.prompt) {
  decided_ = task_.append_forced(0, rules_, opening_);
  pending_.insert(pending_.end(), opening_.committed.begin(), opening_.committed.end());
}

Sharing NtpDecoder::sharing() const {
  return {.kind = kCausal, .most = static_cast<int>(task_.prompt.size()) - 1, .text = true};
}

void NtpDecoder::begin_behind(int n_cached) {
  pending_.erase(pending_.begin(), pending_.begin() + n_cached);
}

Demand NtpDecoder::demand() const {
  return {.least_rows = 1, .prompt_rows = prompt_pending_ ? static_cast<int>(pending_.size()) : 0};
}

Plan NtpDecoder::plan(const Budget& budget) const {
  const int all = static_cast<int>(pending_.size());
  const int rows = std::clamp(budget.rows, 1, all);
  Plan plan;
  plan.segments.push_back(
      {.tokens = {pending_.begin(), pending_.begin() + rows}, .sampling = task_.sampling});
  if (rows == all && !opening_.finished) {
    Segment& chunk = plan.segments.back();
    chunk.outputs = {rows - 1};  // row t predicts the token at t + 1
    rules_.ask_next(plan, chunk);
  }
  return plan;
}

Events NtpDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  pending_.erase(pending_.begin(), pending_.begin() + plan.n_rows());
  Events events = std::exchange(opening_, {});
  if (stats.empty()) {
    return events;
  }
  prompt_pending_ = false;
  events.revealed.push_back(task_.reveal(decided_, stats[0]));
  const auto known = static_cast<std::ptrdiff_t>(events.committed.size());
  task_.append(decided_++, stats[0], rules_, events);
  decided_ += task_.append_forced(decided_, rules_, events);
  pending_.assign(events.committed.begin() + known, events.committed.end());
  return events;
}

}  // namespace sbd
