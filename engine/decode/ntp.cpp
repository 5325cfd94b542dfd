#include "decode/ntp.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

NtpDecoder::NtpDecoder(DecodeTask task)
    : task_(std::move(task)), rules_(task_.rules, task_.prompt), pending_(task_.prompt) {}

Sharing NtpDecoder::sharing() const {
  return {.kind = kCausal, .most = static_cast<int>(task_.prompt.size()) - 1, .text = true};
}

void NtpDecoder::begin_behind(int n_cached) {
  pending_.erase(pending_.begin(), pending_.begin() + n_cached);
}

Demand NtpDecoder::demand() const {
  return {.least_rows = 1, .prompt_rows = decided_ > 0 ? 0 : static_cast<int>(pending_.size())};
}

Plan NtpDecoder::plan(const Budget& budget) const {
  const int all = static_cast<int>(pending_.size());
  const int rows = std::clamp(budget.rows, 1, all);
  Segment chunk;
  chunk.tokens.assign(pending_.begin(), pending_.begin() + rows);
  chunk.sampling = task_.sampling;
  if (rows == all) {
    chunk.outputs = {rows - 1};  // row t predicts the token at t + 1
    rules_.ask_all(chunk);
  }
  return {{chunk}};
}

Events NtpDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  pending_.erase(pending_.begin(), pending_.begin() + plan.n_rows());
  if (stats.empty()) {
    return {};
  }
  Events events;
  events.revealed = {task_.reveal(decided_, stats[0])};
  task_.append(decided_++, stats[0], rules_, events);
  pending_ = events.committed;
  return events;
}

}  // namespace sbd
