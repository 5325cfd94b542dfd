#include "decode/set_block.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {
namespace {

// A hundred times the largest in use. Steps that decide nothing are passed over one by one.
constexpr int kMostSteps = 1 << 16;

}  // namespace

void check_block_method(const BlockMethod& method, const DecodeTask& task) {
  const bool cached = method.commit_attention != CommitAttention::none;
  SBD_CHECK(method.block_size || !cached, "expected a `block_size` with a cache, got none");
  if (method.block_size) check_block_size(*method.block_size, task);
  SBD_CHECK(method.sub_block_size.value_or(1) >= 1, "expected sub_block_size >= 1, got {}",
            *method.sub_block_size);
  const int steps = method.steps.value_or(1);
  SBD_CHECK(steps >= 1 && steps <= kMostSteps, "expected `steps` from 1 to {}, got {}", kMostSteps,
            steps);
  check_unmask(method.unmask);
  SBD_CHECK(cached == (method.prompt_attention != PromptAttention::full),
            "expected commit_attention none with prompt_attention full, and with no other");
  SBD_CHECK(cached ? method.logit_shift == 0 || method.seed_slot : !method.seed_slot,
            "expected seed_slot with logit_shift 1 and a cache, and not without a cache");
  SBD_CHECK(!method.absolute_blocks || method.prompt_attention == PromptAttention::block_causal ||
                method.prompt_attention == PromptAttention::causal,
            "expected prompt_attention causal or block_causal with absolute blocks");
}

SetBlockDecoder::SetBlockDecoder(DecodeTask task, const BlockMethod& method)
    : task_(std::move(task)),
      method_(method),
      block_size_(method.block_size.value_or(task_.tokens_wanted())),
      block_(0, 0, 0, method.mask_token_id) {
  check_block_method(method_, task_);
  const int inside = method_.absolute_blocks ? prompt_size() % block_size_ : 0;
  if (cached()) {
    pending_.assign(task_.prompt.begin(), task_.prompt.end() - inside);
  }
  block_ = make_block(-inside);
}

// The last block keeps its k rows even where fewer tokens are wanted: it is conditioned as any
// other. Only the end of the context cuts it; without a cache the text's end does.
Block SetBlockDecoder::make_block(int begin) const {
  const int size = cached() ? block_size_ : std::min(block_size_, task_.tokens_wanted() - begin);
  Block block = block_at(task_, begin, size, method_.mask_token_id);
  for (int i = 0; begin + i < 0; ++i) {
    block.fill(i, task_.prompt[static_cast<std::size_t>(prompt_size() + begin + i)]);
  }
  return block;
}

// Pending rows of the next forward: all, or as much of a long prompt as may be cut off.
int SetBlockDecoder::pending_rows() const {
  const int all = static_cast<int>(pending_.size());
  if (!prompt_pending_ || method_.prompt_attention == PromptAttention::bidirectional) {
    return all;
  }
  const bool in_blocks = method_.prompt_attention == PromptAttention::block_causal;
  const int unit = in_blocks ? block_size_ : 1;
  return std::min(all, std::max(unit, task_.prefill_rows / unit * unit));
}

bool SetBlockDecoder::pending_runs_whole() const {
  return pending_rows() == static_cast<int>(pending_.size());
}

// Whether the next forward has pending rows only: more of them follow, or the seed does.
bool SetBlockDecoder::commits_alone() const {
  return !pending_.empty() && (seeds() || !pending_runs_whole());
}

// A block that begins inside the prompt needs no seed.
bool SetBlockDecoder::seeds() const { return method_.seed_slot && block_.is_masked(0); }

std::vector<Segment> SetBlockDecoder::commit_segments(int rows) const {
  int length = rows;  // of a segment
  auto attention = Attention::block;
  if (prompt_pending_) {
    if (method_.prompt_attention == PromptAttention::block_causal) length = block_size_;
    if (method_.prompt_attention == PromptAttention::causal) attention = Attention::causal;
  } else if (method_.commit_attention == CommitAttention::causal) {
    attention = Attention::causal;
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

// Prompt, text, block and the masks behind it.
Segment SetBlockDecoder::uncached_segment() const {
  Segment all{.tokens = task_.prompt,
              .attention = Attention::block,
              .kv = Kv::scratch,
              .outputs = candidates(),
              .sampling = task_.sampling};
  all.tokens.insert(all.tokens.end(), text_.begin(), text_.end());
  for (int& row : all.outputs) {
    row += static_cast<int>(all.tokens.size()) - method_.logit_shift;
  }
  all.tokens.insert(all.tokens.end(), block_.tokens().begin(), block_.tokens().end());
  all.tokens.resize(static_cast<std::size_t>(prompt_size() + task_.tokens_wanted()),
                    method_.mask_token_id);
  return all;
}

std::vector<int> SetBlockDecoder::candidates() const {
  std::vector<int> masked = method_.past_eos ? block_.wanted_masked() : block_.masked();
  if (method_.sub_block_size && !masked.empty()) {
    const int size = *method_.sub_block_size;
    const int end = (masked.front() / size + 1) * size;
    masked.erase(std::ranges::lower_bound(masked, end), masked.end());
  }
  return masked;
}

Plan SetBlockDecoder::plan() const {
  Plan plan;
  if (!pending_.empty()) {
    plan.segments = commit_segments(pending_rows());
    if (commits_alone()) {
      if (seeds() && pending_runs_whole()) {
        Segment& last = plan.segments.back();
        last.outputs = {static_cast<int>(last.tokens.size()) - 1};
        last.sampling.draw = static_cast<std::uint64_t>(forwards_);
      }
      return plan;
    }
  }
  if (cached()) {
    plan.segments.push_back({.tokens = block_.tokens(),
                             .attention = Attention::block,
                             .kv = Kv::scratch,
                             .outputs = candidates(),
                             .sampling = task_.sampling});
    for (int& row : plan.segments.back().outputs) {
      row -= method_.logit_shift;
    }
  } else {
    plan.segments.push_back(uncached_segment());
  }
  plan.segments.back().sampling.draw = static_cast<std::uint64_t>(forwards_);  // drawn anew
  return plan;
}

// How many of the block's `masked` positions its next forward decides by the schedule.
int SetBlockDecoder::scheduled(int masked) const {
  const int steps = *method_.steps;
  if (forwards_ + 1 >= steps) {
    return masked;
  }
  if (method_.schedule == Schedule::even) {
    return block_size_ / steps + (forwards_ < block_size_ % steps ? 1 : 0);
  }
  const auto time = [&](int step) { return 1.0 - step * (1.0 - 1e-3) / steps; };
  return static_cast<int>(masked * (1.0 - time(forwards_ + 1) / time(forwards_)));
}

Events SetBlockDecoder::absorb(std::span<const RowStats> stats) {
  const bool alone = commits_alone();
  const bool seeded = alone && pending_runs_whole();
  const std::vector<int> rows = alone ? std::vector<int>() : candidates();
  check_rows(stats, seeded ? 1 : rows.size());
  pending_.erase(pending_.begin(), pending_.begin() + pending_rows());
  Events events;
  if (!pending_.empty()) {
    return events;
  }
  prompt_pending_ = false;
  if (seeded) {
    block_.decide(0, stats[0], task_, events);
    forwards_ = 0;
  } else {
    Unmask unmask = method_.unmask;
    if (method_.steps) {
      const int masked = static_cast<int>(rows.size());
      // A step that decides nothing would leave the next one the same rows: it is passed over.
      while ((unmask.top_n = scheduled(masked)) == 0) ++forwards_;
    }
    ++forwards_;
    for (const int i : select_unmasked(unmask, stats)) {
      block_.decide(rows[static_cast<std::size_t>(i)], stats[static_cast<std::size_t>(i)], task_,
                    events);
    }
  }
  advance(events);
  return events;
}

// Gives out what is final, and goes on to the next block behind a decided one.
void SetBlockDecoder::advance(Events& events) {
  if (!block_.commit(task_, events) || events.finished) {
    return;
  }
  std::vector<TokenId>& decided = cached() ? pending_ : text_;
  decided.insert(decided.end(), block_.tokens().begin(), block_.tokens().end());
  block_ = make_block(block_.begin() + block_.size());
  if (!seeds()) forwards_ = 0;  // a seed is drawn at the last block's row, which has been drawn
}

}  // namespace sbd
