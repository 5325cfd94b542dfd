#include "decode/d2f.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

D2fDecoder::D2fDecoder(DecodeTask task, const D2fMethod& method)
    : task_(std::move(task)), rules_(task_.rules, task_.prompt), method_(method) {
  check_block_size(method.block_size, task_);
  prepare_step();
}

namespace {

float decided_share(const Block& block) {
  const int decided = block.size() - static_cast<int>(block.all_masked().size());
  return static_cast<float>(decided) / static_cast<float>(block.size());
}

}  // namespace

// Parts 1 and 2 of a step; the prompt and cached blocks are wholly decided.
void D2fDecoder::prepare_step() {
  const float last = flights_.empty() ? 1.0f : decided_share(flights_.back().block);
  if (!ended_ && next_begin_ < task_.tokens_wanted() && last >= method_.block_add_threshold) {
    flights_.push_back({block_at(task_, next_begin_, method_.block_size, method_.mask_token_id)});
    next_begin_ += flights_.back().block.size();
  }
  float before = 1.0f;
  for (Flight& flight : flights_) {
    flight.activated = flight.activated || before >= method_.decoded_token_threshold;
    before = decided_share(flight.block);
  }
}

// A block's rows whose statistics are wanted: those that predict its masked positions and, where
// logits are shifted, its last one for the first position behind it.
std::vector<int> D2fDecoder::outputs(std::size_t index) const {
  const Flight& flight = flights_[index];
  std::vector<int> rows = flight.block.all_masked();
  if (method_.logit_shift == 0) {
    return rows;
  }
  std::erase(rows, 0);
  for (int& row : rows) {
    --row;
  }
  const bool before_mask = index + 1 < flights_.size() && flights_[index + 1].block.is_masked(0);
  if (flight.decided || before_mask) {
    rows.push_back(flight.block.size() - 1);
  }
  return rows;
}

// The prompt is one block: each of its rows sees all of it.
Sharing D2fDecoder::sharing() const { return {}; }

void D2fDecoder::begin_behind(int n_cached) {
  SBD_CHECK(n_cached == 0, "d2f cannot begin behind {} cached positions", n_cached);
}

Demand D2fDecoder::demand() const {
  const int prompt_rows = prompt_pending_ ? static_cast<int>(task_.prompt.size()) : 0;
  int rows = prompt_rows;
  for (const Flight& flight : flights_) rows += flight.block.size();
  return {.least_rows = rows, .prompt_rows = prompt_rows};
}

Plan D2fDecoder::plan(const Budget&) const {
  Plan plan;
  if (prompt_pending_) {
    plan.segments.push_back({.tokens = task_.prompt,
                             .attention = Attention::block,
                             .kv = Kv::commit,
                             .sampling = task_.sampling});
    if (method_.logit_shift == 1) {
      plan.segments.back().outputs = {static_cast<int>(task_.prompt.size()) - 1};
      rules_.ask_all(plan.segments.back());
    }
  }
  for (std::size_t i = 0; i < flights_.size(); ++i) {
    const Flight& flight = flights_[i];
    Segment segment{.tokens = flight.block.tokens(),
                    .attention = Attention::block,
                    .kv = flight.decided ? Kv::commit : Kv::scratch,
                    .outputs = outputs(i),
                    .decides = method_.logit_shift,
                    .sampling = task_.sampling};
    segment.sampling.draw = static_cast<std::uint64_t>(flight.forwards);
    rules_.ask_all(segment);
    plan.segments.push_back(std::move(segment));
  }
  return plan;
}

Events D2fDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  std::span<const Segment> segments = plan.segments;
  Events events;
  if (prompt_pending_) {
    if (method_.logit_shift == 1) {
      kept_ = stats.front();
      stats = stats.subspan(1);
    }
    segments = segments.subspan(1);
    prompt_pending_ = false;
  }

  RowStats before = kept_;  // of the row in front of the block
  for (std::size_t i = 0; i < flights_.size(); ++i) {
    Flight& flight = flights_[i];
    const std::size_t n = segments[i].outputs.size();
    std::vector<RowStats> rows(stats.begin(), stats.begin() + static_cast<std::ptrdiff_t>(n));
    stats = stats.subspan(n);
    const RowStats last = rows.empty() ? RowStats{} : rows.back();
    if (flight.decided) {
      kept_ = last;
    } else {
      if (method_.logit_shift == 1 && flight.block.is_masked(0)) {
        rows.insert(rows.begin(), before);
      }
      decide(flight, rows, events);
    }
    before = last;
  }

  std::erase_if(flights_, [](const Flight& flight) { return flight.decided; });
  for (Flight& flight : flights_) {
    if (!flight.block.commit(task_, events) || events.finished) {
      break;
    }
  }
  for (Flight& flight : flights_) {
    if (!flight.block.all_masked().empty()) {
      break;
    }
    flight.decided = true;
  }
  prepare_step();
  return events;
}

float D2fDecoder::probability(const RowStats& row) const {
  return task_.sampling.temperature > 0.0f ? row.sampled_probability : row.top_probability;
}

// Part 4, `stats` being those of the block's masked positions in order, and perhaps others behind.
void D2fDecoder::decide(Flight& flight, std::span<const RowStats> stats, Events& events) {
  const std::vector<int> masked = flight.block.all_masked();
  std::vector<std::size_t> chosen;
  std::size_t best = 0;
  for (std::size_t i = 0; i < masked.size(); ++i) {
    if (probability(stats[i]) > method_.skip_threshold) {
      chosen.push_back(i);
    }
    if (probability(stats[i]) > probability(stats[best])) {
      best = i;
    }
  }
  if (chosen.empty() && flight.activated && !masked.empty()) {
    chosen.push_back(best);
  }
  ++flight.forwards;
  for (const std::size_t i : chosen) {
    flight.block.decide(masked[i], stats[i], task_, events);
    const TokenId token = flight.block[masked[i]];
    rules_.add(token);
    ended_ = ended_ || task_.is_eos(token);
  }
}

}  // namespace sbd
