#include "decode/dmtd.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

DmtdDecoder::DmtdDecoder(DecodeTask task, const DmtdMethod& method)
    : task_(std::move(task)), rules_(task_.rules, task_.prompt), method_(method) {
  decided_ = task_.append_forced(0, rules_, opening_);
  take(task_.prompt);
  take(opening_.committed);
}

void DmtdDecoder::take(std::span<const TokenId> tokens) {
  waiting_.insert(waiting_.end(), tokens.begin(), tokens.end());
  n_new_ += static_cast<int>(tokens.size());
}

bool DmtdDecoder::is_head(int position) const {
  const int first = method_.prompt_rule == DmtdPromptRule::train ? 0 : prompt_size();
  return (position - first) % method_.horizon == 0;
}

// Whether any of the waiting tokens [begin, end) goes through T at once: prompts and heads do.
bool DmtdDecoder::thinks(int begin, int end) const {
  for (int position = in_thinking_ + begin; position < in_thinking_ + end; ++position) {
    if (position < prompt_size() || is_head(position)) return true;
  }
  return false;
}

// Waiting tokens [begin, end), all through T and D. Rows of equal coefficients share a segment.
void DmtdDecoder::append_rows(std::vector<Segment>& segments, int begin, int end) const {
  for (int i = begin; i < end; ++i) {
    const int position = in_thinking_ + i;
    const bool prompt = position < prompt_size();
    const bool head = (prompt && method_.prompt_rule != DmtdPromptRule::train) || is_head(position);
    const float e_factor = prompt && method_.prompt_rule == DmtdPromptRule::plain ? 0.0f : 1.0f;
    const float h_factor = head ? 1.0f : 0.0f;
    if (i == begin || segments.back().e_factor != e_factor ||
        segments.back().h_factor != h_factor) {
      segments.push_back(
          {.tokens = {}, .sampling = task_.sampling, .e_factor = e_factor, .h_factor = h_factor});
    }
    segments.back().tokens.push_back(waiting_[static_cast<std::size_t>(i)]);
  }
}

// A generated row's share of the thinking layers hangs on where its text began.
Sharing DmtdDecoder::sharing() const {
  const bool train = method_.prompt_rule == DmtdPromptRule::train;
  return {.kind = format("dmtd {} {}", static_cast<int>(method_.prompt_rule),
                         train ? method_.horizon : 0),
          .most = prompt_size() - 1};
}

void DmtdDecoder::begin_behind(int n_cached) {
  in_thinking_ = n_cached;
  waiting_.erase(waiting_.begin(), waiting_.begin() + n_cached);
  n_new_ -= n_cached;
}

Demand DmtdDecoder::demand() const {
  const int left = std::max(prompt_size() - in_thinking_, 0);
  const int old = n_old();
  return {.least_rows = thinks(old, old + 1) ? old + 1 : 1, .prompt_rows = left};
}

Plan DmtdDecoder::plan(const Budget& budget) const {
  const int old = n_old(), all = static_cast<int>(waiting_.size());
  int end = std::min(all, old + std::max(budget.rows, 1));
  // T takes the old ones once more.
  if (thinks(old, end)) end = std::clamp(budget.rows, old + 1, end);
  Plan plan;
  if (thinks(old, end)) {
    plan.start = in_thinking_;
    if (old > 0) {
      plan.segments.push_back(
          {.tokens = {waiting_.begin(), waiting_.begin() + old}, .layers = Layers::refill});
    }
    append_rows(plan.segments, old, end);
  } else {
    plan.start = in_thinking_ + old;
    plan.segments.push_back({.tokens = {waiting_.begin() + old, waiting_.begin() + end},
                             .sampling = task_.sampling,
                             .layers = Layers::skip,
                             .e_factor = 1.0f,
                             .h_factor = 0.0f});
  }
  if (end < all || opening_.finished) return plan;
  Segment& last = plan.segments.back();
  last.outputs = {static_cast<int>(last.tokens.size()) - 1};
  rules_.ask_next(plan, last);
  return plan;
}

Events DmtdDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  Events events = std::exchange(opening_, {});
  events.ran_thinking = plan.segments.back().layers != Layers::skip;
  if (events.ran_thinking) {
    n_new_ -= plan.n_rows() - n_old();
    waiting_.erase(waiting_.begin(), waiting_.begin() + plan.n_rows());
    in_thinking_ += plan.n_rows();
  } else {
    n_new_ -= plan.n_rows();
  }
  if (stats.empty()) {
    return events;
  }
  const auto known = events.committed.size();
  events.revealed.push_back(task_.reveal(decided_, stats[0]));
  task_.append(decided_++, stats[0], rules_, events);
  decided_ += task_.append_forced(decided_, rules_, events);
  take(std::span(events.committed).subspan(known));
  return events;
}

}  // namespace sbd
