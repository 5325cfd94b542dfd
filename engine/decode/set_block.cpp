#include "decode/set_block.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

SetBlockDecoder::SetBlockDecoder(DecodeTask task, const BlockMethod& method)
    : BlockwiseDecoder(std::move(task), method) {
  const int inside = method_.absolute_blocks ? prompt_size() % block_size_ : 0;
  pending_.assign(task_.prompt.begin(), task_.prompt.end() - inside);
  prompt_pending_ = !pending_.empty();
  block_ = make_block(-inside);
  settled_ = inside;
  settle(opening_);
  advance(opening_);
}

// The last block keeps its k rows even where fewer tokens are wanted: it is conditioned as any
// other. Only the end of the context cuts it.
Block SetBlockDecoder::make_block(int begin) const {
  Block block = block_at(task_, begin, block_size_, method_.mask_token_id);
  for (int i = 0; begin + i < 0; ++i) {
    block.fill(i, task_.prompt[static_cast<std::size_t>(prompt_size() + begin + i)]);
  }
  return block;
}

// A block that begins inside the prompt needs no seed.
bool SetBlockDecoder::seeds() const { return method_.seed_slot && block_.is_masked(0); }

int SetBlockDecoder::block_rows() const {
  const bool nothing_to_ask = opening_.finished || candidates().empty();
  // A forward has some rows, whatever for.
  return seeds() || (nothing_to_ask && !pending_.empty()) ? 0 : block_.size();
}

// Pending rows of the next forward: all, or a part of a long prompt, which leaves the block some to
// go with.
int SetBlockDecoder::pending_rows(int budget) const {
  const int all = static_cast<int>(pending_.size());
  const bool whole = !prompt_pending_ || method_.prompt_attention == PromptAttention::bidirectional;
  const bool in_blocks = method_.prompt_attention == PromptAttention::block_causal;
  const int unit = in_blocks ? block_size_ : 1;
  if (whole || all <= unit || all + block_rows() <= budget) return all;
  return std::clamp(budget / unit * unit, unit, (all - 1) / unit * unit);
}

Sharing SetBlockDecoder::sharing() const {
  const int most = static_cast<int>(pending_.size()) - (block_rows() == 0 ? 1 : 0);
  switch (method_.prompt_attention) {
    case PromptAttention::causal:
      return {.kind = kCausal,
              .most = most,
              .text = method_.commit_attention == CommitAttention::causal};
    case PromptAttention::block_causal:
      return {.kind = format("blocks of {}", block_size_), .unit = block_size_, .most = most};
    case PromptAttention::bidirectional:
    case PromptAttention::full: break;
  }
  return {};
}

void SetBlockDecoder::begin_behind(int n_cached) {
  pending_.erase(pending_.begin(), pending_.begin() + n_cached);
}

Demand SetBlockDecoder::demand() const {
  const int all = static_cast<int>(pending_.size());
  const int rows = pending_rows(0);
  return {.least_rows = rows + (rows == all ? block_rows() : 0),
          .prompt_rows = prompt_pending_ ? all : 0};
}

std::vector<Segment> SetBlockDecoder::commit_segments(int rows) const {
  int length = rows;  // of a segment
  auto attention = Attention::block;
  if (prompt_pending_) {
    if (method_.prompt_attention == PromptAttention::block_causal) length = block_size_;
    if (method_.prompt_attention == PromptAttention::causal) attention = Attention::causal;
  } else if (method_.commit_attention == CommitAttention::causal) {
    attention = Attention::causal;
  } else {
    length = block_size_;
  }
  std::vector<Segment> segments;
  for (int begin = 0; begin < rows; begin += length) {
    const auto first = pending_.begin() + begin;
    segments.push_back({.tokens = {first, first + std::min(length, rows - begin)},
                        .attention = attention,
                        .kv = Kv::commit,
                        .outputs = {},
                        .sampling = task_.sampling});
  }
  return segments;
}

Plan SetBlockDecoder::plan(const Budget& budget) const {
  const int rows = pending_rows(budget.rows);
  Plan plan{commit_segments(rows)};
  const bool more = rows < static_cast<int>(pending_.size());
  if (more) return plan;
  if (rows > 0 && seeds()) {
    Segment& last = plan.segments.back();
    last.outputs = {static_cast<int>(last.tokens.size()) - 1};
    last.sampling.draw = draw();
    rules_.ask_next(plan, last);
  } else if (block_rows() > 0) {
    Segment block{.tokens = block_.tokens(),
                  .attention = Attention::block,
                  .kv = Kv::scratch,
                  .outputs = candidates(),
                  .decides = method_.logit_shift,
                  .sampling = task_.sampling};
    for (int& row : block.outputs) {
      row -= method_.logit_shift;
    }
    block.sampling.draw = draw();
    if (opening_.finished) {
      block.outputs.clear();
    } else {
      rules_.ask_block(plan, block);
    }
    plan.segments.push_back(std::move(block));
  }
  return plan;
}

Events SetBlockDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  pending_.erase(pending_.begin(), pending_.begin() + plan.n_committed());
  Events events = std::exchange(opening_, {});
  if (events.finished || !pending_.empty()) {
    return events;
  }
  prompt_pending_ = false;
  const Segment& last = plan.segments.back();
  if (stats.empty()) {  // the block is forced
  } else if (last.kv == Kv::commit) {
    decide(0, stats[0], events);
    forwards_ = 0;
  } else {
    std::vector<int> positions = last.outputs;
    for (int& position : positions) {
      position += method_.logit_shift;
    }
    decide(positions, stats, events);
  }
  settle(events);
  advance(events);
  return events;
}

void SetBlockDecoder::settle(Events& events) {
  if (!rules_.constrained()) return;
  const auto behind = std::span(block_.tokens())
                          .first(static_cast<std::size_t>(block_.end()))
                          .subspan(static_cast<std::size_t>(settled_));
  if (!behind.empty() && task_.is_eos(behind.front())) {
    ++settled_;
    return;
  }
  const auto [followed, ended] = rules_.follow(behind, method_.mask_token_id);
  // The first place was decided under what the grammar allows there: to decide it again is no help.
  if (followed.empty() && !ended && !behind.empty() && behind.front() != method_.mask_token_id) {
    fail(ErrorKind::grammar, "token {} may not follow in this grammar, or has met its limits",
         behind.front());
  }
  for (const TokenId token : followed) {
    if (block_[settled_] != token) {
      if (rules_.scored()) break;  // it needs a row of its own
      block_.fill(settled_, token);
      events.revealed.push_back({block_.begin() + settled_, token, 0.0f, 1.0f});
    }
    rules_.add(token);
    ++settled_;
  }
  if (ended && rules_.ended()) {
    block_.cut(settled_);
  } else if (settled_ < block_.end() && !block_.is_masked(settled_)) {
    block_.mask_from(settled_);
  }
}

// Gives out what is final, and goes on to the next block behind a decided one. What is forced may
// decide that too.
void SetBlockDecoder::advance(Events& events) {
  while (block_.commit(task_, events)) {
    if (events.finished != FinishReason::stop && rules_.ended()) {
      events.finished = FinishReason::complete;
    }
    if (events.finished || !joins_pending()) return;
    pending_.insert(pending_.end(), block_.tokens().begin(), block_.tokens().end());
    block_ = make_block(block_.begin() + block_.size());
    settled_ = 0;
    if (!seeds()) forwards_ = 0;  // a seed goes on counting
    settle(events);
  }
}

// A prompt may be cached in another way than what follows it.
bool SetBlockDecoder::joins_pending() const {
  return !prompt_pending_ || (method_.prompt_attention == PromptAttention::causal &&
                              method_.commit_attention == CommitAttention::causal);
}

}  // namespace sbd
