#include "decode/lossless.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {
namespace {

DraftPolicy make_policy(const LosslessMethod& method, float temperature) {
  const Draft start{.size = method.block_size, .boldness = kAsWritten, .begins = method.begins};
  if (method.history == nullptr) return DraftPolicy(start);
  return {start, method.rule_kept, !method.fused, temperature, method.history};
}

// Positions that are guesses: the block's first one never is.
std::vector<int> guesses_of(const Block& block) {
  std::vector<int> rows = block.masked();
  std::erase(rows, 0);
  return rows;
}

int rows_of(const std::vector<Block>& blocks) {
  int rows = 0;
  for (const Block& block : blocks) rows += block.size();
  return rows;
}

}  // namespace

LosslessDecoder::LosslessDecoder(DecodeTask task, const LosslessMethod& method)
    : task_(std::move(task)),
      rules_(task_.rules, task_.prompt),
      method_(method),
      policy_(make_policy(method, task_.sampling.temperature)),
      pending_(task_.prompt),
      block_(0, 0, 0, method.mask_token_id) {
  check_block_size(method.block_size, task_);
  accepted_ = task_.append_forced(0, rules_, opening_);
  pending_.insert(pending_.end(), opening_.committed.begin(), opening_.committed.end());
}

int LosslessDecoder::behind() const {
  return cached_ + static_cast<int>(pending_.size()) - static_cast<int>(task_.prompt.size());
}

bool LosslessDecoder::draft_ends() const {
  return drafted_ &&
         (completes_ || task_.is_eos(pending_.back()) || behind() == task_.tokens_wanted());
}

bool LosslessDecoder::drafts_behind_known() const {
  return !method_.fused && accepted_ > 0 && pending_.size() == 1;
}

Block LosslessDecoder::next_block(int size, int before) const {
  const bool known = drafts_behind_known();
  Block block = block_at(task_, behind() - before - (known ? 1 : 0), size, method_.mask_token_id);
  if (known) block.fill(0, pending_.front());
  return block;
}

std::vector<Block> LosslessDecoder::next_drafts(const Budget& budget) const {
  if (draft_ends() || in_vain_ || !(method_.fused || drafts_behind_known())) return {};
  const int left = task_.tokens_wanted() - behind();
  // A row that is verified anyway decides the text's last token.
  Draft draft = policy_.choose(budget.price, std::max(1, method_.fused ? left - 1 : left));
  const bool verifies = drafted_ && pending_.size() > 1;
  if (draft.begins == Begins::alone && verifies) return {};
  if (!policy_.fixed()) {
    const int rows = method_.fused ? static_cast<int>(pending_.size()) : 0;
    draft.size = std::clamp(budget.rows - rows, 1, draft.size);
  }
  if (draft.size == 1) return {};
  std::vector<Block> blocks = {next_block(draft.size)};
  if (guesses_of(blocks.front()).empty()) return {};
  if (draft.begins != Begins::every || !verifies) return blocks;
  const int n = static_cast<int>(pending_.size());
  for (int before = 1; before < n; ++before) blocks.push_back(next_block(draft.size, before));
  const int rows = n + rows_of(blocks);
  // As many rows as were reckoned with, where the draft before was as large; in the budget, and at
  // places that the text may take.
  const bool fits = rows <= policy_.chosen().rows() && cached_ + rows <= most_positions() &&
                    (policy_.fixed() || rows <= budget.rows);
  if (!fits) blocks.erase(blocks.begin() + 1, blocks.end());
  return blocks;
}

std::vector<Block> LosslessDecoder::blocks(const Budget& budget) const {
  return pending_.empty() ? std::vector{block_} : next_drafts(budget);
}

// A draft, all of a prompt, or a part of a long one, which leaves the block some to go with.
int LosslessDecoder::pending_rows(int budget, int block_rows) const {
  const int all = static_cast<int>(pending_.size());
  if (drafted_) return draft_ends() ? all - 1 : all;
  if (all <= 1 || all + block_rows <= budget) return all;
  return std::clamp(budget, 1, all - 1);
}

Sharing LosslessDecoder::sharing() const {
  return {.kind = kCausal, .most = static_cast<int>(task_.prompt.size()) - 1, .text = true};
}

void LosslessDecoder::begin_behind(int n_cached) {
  pending_.erase(pending_.begin(), pending_.begin() + n_cached);
  cached_ = n_cached;
}

int LosslessDecoder::most_positions() const {
  return task_.most_positions(policy_.fixed() ? method_.block_size : 1);
}

Demand LosslessDecoder::demand() const {
  const bool prompt = cached_ < static_cast<int>(task_.prompt.size());
  const int all = static_cast<int>(pending_.size());
  const int block_rows = rows_of(blocks({.rows = 0}));
  if (pending_.empty() || (block_rows > 0 && drafts_behind_known())) {
    return {.least_rows = block_rows, .prompt_rows = 0};
  }
  const int rows = pending_rows(0, block_rows);
  return {.least_rows = rows + (drafted_ || rows == all ? block_rows : 0),
          .prompt_rows = prompt ? all : 0};
}

Plan LosslessDecoder::plan(const Budget& budget) const {
  Plan plan{.segments = {}, .start = cached_};
  std::vector<Block> next = blocks(budget);
  // Behind the text, whose newest token it begins with.
  std::span<const TokenId> draft;
  if (!pending_.empty() && !(!next.empty() && drafts_behind_known())) {
    const int rows = pending_rows(budget.rows, rows_of(next));
    const bool all = drafted_ || rows == static_cast<int>(pending_.size());
    const bool whole = all && !opening_.finished;
    if (!whole) next.clear();
    if (drafted_) draft = std::span<const TokenId>(pending_).subspan(1);
    Segment commit{.tokens = {pending_.begin(), pending_.begin() + rows},
                   .sampling = task_.sampling};
    // Every row of a draft is asked for the token behind it, of other rows the last one.
    for (int row = drafted_ ? 0 : rows - 1; whole && row < rows; ++row) {
      commit.outputs.push_back(row);
    }
    rules_.ask_next(plan, commit, draft);
    plan.segments.push_back(std::move(commit));
  }
  for (std::size_t before = 0; before < next.size(); ++before) {
    const Block& block = next[before];
    Segment masks{.tokens = block.tokens(),
                  .attention = Attention::block,
                  .kv = Kv::scratch,
                  .outputs = guesses_of(block),
                  .decides = 0,
                  .sampling = task_.sampling};
    masks.adapted = method_.adapted;
    if (before > 0) masks.begin = block.begin() + static_cast<int>(task_.prompt.size());
    // Scores are those of the rows that verify.
    if (const auto rules = rules_.rules(draft.first(draft.size() - before))) {
      masks.asks.assign(masks.outputs.size(), {.rules = rules});
    }
    plan.segments.push_back(std::move(masks));
  }
  return plan;
}

Events LosslessDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  Events events = std::exchange(opening_, {});
  if (events.finished) return events;
  const auto known = events.committed.size();
  const bool drafts = plan.segments.back().kv == Kv::scratch;
  const Segment* masks = nullptr;
  if (plan.segments.front().kv == Kv::commit) {
    const auto next = stats.first(plan.segments.front().outputs.size());
    stats = stats.subspan(next.size());
    const std::size_t refused = commit(plan, next, events);
    if (next.empty()) return events;
    const bool verifies = events.guesses > 0;
    events.kind = verifies ? (drafts ? ForwardKind::verify_and_draft : ForwardKind::verify)
                           : (drafts ? ForwardKind::draft : ForwardKind::next_token);
    policy_.ran(static_cast<int>(events.committed.size() - known));
    if (events.finished) return events;
    // The block behind what was kept. It would begin with what is forced, which needs no draft.
    if (const auto at = 1 + refused; at < plan.segments.size() && rules_.forced().empty()) {
      for (std::size_t i = 1; i < at; ++i) stats = stats.subspan(plan.segments[i].outputs.size());
      masks = &plan.segments[at];
      begin_block(*masks, events.committed.back());
    } else {
      const auto newest = static_cast<std::ptrdiff_t>(events.committed.size()) - 1;
      accepted_ += task_.append_forced(accepted_, rules_, events);
      pending_.assign(events.committed.begin() + newest, events.committed.end());
      drafted_ = refused == 0 && pending_.size() == 1;
      completes_ = in_vain_ = false;
    }
  } else {
    events.kind = ForwardKind::draft;
    masks = &plan.segments.front();
    if (!pending_.empty()) begin_block(*masks, std::exchange(pending_, {}).front());
  }
  if (masks != nullptr) denoise(*masks, stats.first(masks->outputs.size()), events);
  return events;
}

// Rows that commit, `next` being their statistics. How many of their tokens are not the text's.
std::size_t LosslessDecoder::commit(const Plan& plan, std::span<const RowStats> next,
                                    Events& events) {
  const auto all = pending_.size();
  const std::size_t kept =
      drafted_ ? count_agreeing(next) : static_cast<std::size_t>(plan.n_committed());
  cached_ += static_cast<int>(kept);
  if (drafted_) {
    events.accepted = static_cast<int>(kept);
    events.guesses = static_cast<int>(all) - 1;
    for (std::size_t i = 1; i < kept; ++i) accept(next[i - 1], /*revealed=*/true, events);
    if (events.guesses > 0) {
      policy_.verified(draft_, events.guesses, forwards_, static_cast<int>(kept) - 1);
    }
  }
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(kept));
  if (!next.empty() && !events.finished) {
    accept(kept == all ? next.back() : next[kept - 1], /*revealed=*/false, events);
  }
  return all - kept;
}

// The block whose masks those were, its first token known by now.
void LosslessDecoder::begin_block(const Segment& masks, TokenId first) {
  const int begin = cached_ - static_cast<int>(task_.prompt.size());
  pending_.clear();
  drafted_ = false;
  block_ = block_at(task_, begin, static_cast<int>(masks.tokens.size()), method_.mask_token_id);
  block_.fill(0, first);
  draft_ = policy_.chosen();
  forwards_ = 0;
}

void LosslessDecoder::denoise(const Segment& masks, std::span<const RowStats> stats,
                              Events& events) {
  ++forwards_;
  const float times = kBoldness[static_cast<std::size_t>(draft_.boldness)];
  for (const int i : select_unmasked(bolder(method_.unmask, times), stats)) {
    const auto at = static_cast<std::size_t>(i);
    block_.decide(masks.outputs[at], stats[at], task_, events);
  }
  if (!guesses_of(block_).empty()) return;
  const std::span<const TokenId> draft =
      std::span(block_.tokens()).first(static_cast<std::size_t>(block_.end()));
  const auto [followed, ended] = rules_.follow(draft.subspan(1));
  pending_ = {draft.front()};
  for (const TokenId token : followed) {
    const int i = static_cast<int>(pending_.size());
    if (token != block_[i]) events.revealed.push_back({block_.begin() + i, token, 0.0f, 1.0f});
    pending_.push_back(token);
  }
  drafted_ = true;
  completes_ = ended;
  in_vain_ = !method_.fused && followed.empty();
}

std::size_t LosslessDecoder::count_agreeing(std::span<const RowStats> next) const {
  std::size_t kept = 1;
  while (kept < pending_.size() && task_.choose(next[kept - 1]) == pending_[kept]) {
    ++kept;
  }
  return kept;
}

void LosslessDecoder::accept(const RowStats& row, bool revealed, Events& events) {
  if (!revealed) {
    events.revealed.push_back(task_.reveal(accepted_, row));
  }
  task_.append(accepted_++, row, rules_, events);
}

}  // namespace sbd
