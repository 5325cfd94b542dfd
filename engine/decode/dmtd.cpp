#include "decode/dmtd.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

DmtdDecoder::DmtdDecoder(DecodeTask task, const DmtdMethod& method)
    : task_(std::move(task)), method_(method) {
  SBD_CHECK(method.horizon >= 1, "expected `horizon` >= 1, got {}", method.horizon);
}

bool DmtdDecoder::is_head(int position) const {
  const int first = method_.prompt_rule == DmtdPromptRule::train ? 0 : prompt_size();
  return (position - first) % method_.horizon == 0;
}

// Prompt rows [read_, end): every one goes through T. Rows of equal coefficients share a segment.
std::vector<Segment> DmtdDecoder::prompt_segments(int end) const {
  std::vector<Segment> segments;
  for (int position = read_; position < end; ++position) {
    Segment row{.tokens = {}, .sampling = task_.sampling};
    row.encoded = method_.prompt_rule == DmtdPromptRule::plain ? 0.0f : 1.0f;
    row.thought = method_.prompt_rule == DmtdPromptRule::train && !is_head(position) ? 0.0f : 1.0f;
    if (segments.empty() || segments.back().thought != row.thought) {
      segments.push_back(std::move(row));
    }
    segments.back().tokens.push_back(task_.prompt[static_cast<std::size_t>(position)]);
  }
  return segments;
}

Plan DmtdDecoder::plan() const {
  Plan plan;
  if (read_ < prompt_size()) {
    const int end = std::min(prompt_size(), read_ + task_.prefill_rows);
    plan = {.segments = prompt_segments(end), .start = read_};
    if (end < prompt_size()) {
      return plan;
    }
  } else {
    const int newest = thought_ + static_cast<int>(waiting_.size()) - 1;
    const bool head = is_head(newest);
    plan.start = head ? thought_ : newest;
    if (head && waiting_.size() > 1) {
      plan.segments.push_back(
          {.tokens = {waiting_.begin(), waiting_.end() - 1}, .layers = Layers::refill});
    }
    plan.segments.push_back({.tokens = {waiting_.back()},
                             .sampling = task_.sampling,
                             .layers = head ? Layers::all : Layers::skip,
                             .encoded = 1.0f,
                             .thought = head ? 1.0f : 0.0f});
  }
  Segment& last = plan.segments.back();
  last.outputs = {static_cast<int>(last.tokens.size()) - 1};
  return plan;
}

Events DmtdDecoder::absorb(std::span<const RowStats> stats) {
  Events events;
  if (read_ < prompt_size()) {
    events.thought = true;
    read_ = thought_ = std::min(prompt_size(), read_ + task_.prefill_rows);
  } else if (is_head(thought_ + static_cast<int>(waiting_.size()) - 1)) {
    events.thought = true;
    thought_ += static_cast<int>(waiting_.size());
    waiting_.clear();
  }
  const std::size_t wanted = read_ == prompt_size() ? 1 : 0;
  check_rows(stats, wanted);
  if (stats.empty()) {
    return events;
  }
  const TokenId token = task_.choose(stats[0]);
  waiting_.push_back(token);
  events.revealed = {task_.reveal(decided_, stats[0])};
  events.committed = {token};
  ++decided_;
  events.finished = task_.finish(token, decided_);
  return events;
}

}  // namespace sbd
