#include "decode/dmtd.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

DmtdDecoder::DmtdDecoder(DecodeTask task, const DmtdMethod& method)
    : task_(std::move(task)), rules_(task_.rules, task_.prompt), method_(method) {}

bool DmtdDecoder::is_head(int position) const {
  const int first = method_.prompt_rule == DmtdPromptRule::train ? 0 : prompt_size();
  return (position - first) % method_.horizon == 0;
}

// Prompt rows [read_, end): every one goes through T. Rows of equal coefficients share a segment.
std::vector<Segment> DmtdDecoder::prompt_segments(int end) const {
  std::vector<Segment> segments;
  for (int position = read_; position < end; ++position) {
    Segment row{.tokens = {}, .sampling = task_.sampling};
    row.e_factor = method_.prompt_rule == DmtdPromptRule::plain ? 0.0f : 1.0f;
    row.h_factor = method_.prompt_rule == DmtdPromptRule::train && !is_head(position) ? 0.0f : 1.0f;
    if (segments.empty() || segments.back().h_factor != row.h_factor) {
      segments.push_back(std::move(row));
    }
    segments.back().tokens.push_back(task_.prompt[static_cast<std::size_t>(position)]);
  }
  return segments;
}

// A generated row's share of the thinking layers hangs on where its text began.
Sharing DmtdDecoder::sharing() const {
  const bool train = method_.prompt_rule == DmtdPromptRule::train;
  return {.kind = format("dmtd {} {}", static_cast<int>(method_.prompt_rule),
                         train ? method_.horizon : 0),
          .most = prompt_size() - 1};
}

void DmtdDecoder::begin_behind(int n_cached) { read_ = in_thinking_ = n_cached; }

Demand DmtdDecoder::demand() const {
  const int left = prompt_size() - read_;
  if (left > 0) return {.least_rows = 1, .prompt_rows = left};
  const int waiting = static_cast<int>(waiting_.size());
  return {.least_rows = is_head(in_thinking_ + waiting - 1) ? waiting : 1, .prompt_rows = 0};
}

Plan DmtdDecoder::plan(const Budget& budget) const {
  Plan plan;
  if (read_ < prompt_size()) {
    const int end = std::min(prompt_size(), read_ + std::max(budget.rows, 1));
    plan = {.segments = prompt_segments(end), .start = read_};
    if (end < prompt_size()) {
      return plan;
    }
  } else {
    const int newest = in_thinking_ + static_cast<int>(waiting_.size()) - 1;
    const bool head = is_head(newest);
    plan.start = head ? in_thinking_ : newest;
    if (head && waiting_.size() > 1) {
      plan.segments.push_back(
          {.tokens = {waiting_.begin(), waiting_.end() - 1}, .layers = Layers::refill});
    }
    plan.segments.push_back({.tokens = {waiting_.back()},
                             .sampling = task_.sampling,
                             .layers = head ? Layers::all : Layers::skip,
                             .e_factor = 1.0f,
                             .h_factor = head ? 1.0f : 0.0f});
  }
  Segment& last = plan.segments.back();
  last.outputs = {static_cast<int>(last.tokens.size()) - 1};
  rules_.ask_next(plan, last);
  return plan;
}

Events DmtdDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  Events events;
  events.ran_thinking = plan.segments.back().layers != Layers::skip;
  if (read_ < prompt_size()) {
    read_ = in_thinking_ = read_ + plan.n_rows();
  } else if (events.ran_thinking) {
    in_thinking_ += plan.n_rows();
    waiting_.clear();
  }
  if (stats.empty()) {
    return events;
  }
  events.revealed = {task_.reveal(decided_, stats[0])};
  task_.append(decided_++, stats[0], rules_, events);
  waiting_.push_back(events.committed.back());
  return events;
}

}  // namespace sbd
