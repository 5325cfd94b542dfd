#include "decode/decoder.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace sbd {
namespace {

void complete(const TextRules& text_rules, Events& events) {
  if (events.finished == FinishReason::stop) return;
  if (text_rules.ended()) events.finished = FinishReason::complete;
}

}  // namespace

int DecodeTask::tokens_wanted() const {
  return std::min(max_tokens, n_ctx - static_cast<int>(prompt.size()));
}

int DecodeTask::most_positions(int block_size) const {
  const int text = static_cast<int>(prompt.size()) + tokens_wanted();
  return std::min(n_ctx - text, block_size - 1) + text;
}

bool DecodeTask::is_eos(TokenId token) const {
  return std::ranges::find(eos_token_ids, token) != eos_token_ids.end();
}

std::optional<FinishReason> DecodeTask::finish(TokenId token, int count) const {
  if (is_eos(token)) return FinishReason::stop;
  if (count == tokens_wanted()) return FinishReason::length;
  return std::nullopt;
}

TokenId DecodeTask::choose(const RowStats& row) const {
  return sampling.temperature > 0.0f ? row.sampled : row.argmax;
}

void DecodeTask::append(int position, const RowStats& row, TextRules& text_rules,
                        Events& events) const {
  const TokenId token = choose(row);
  events.committed.push_back(token);
  if (row.scores) events.scores.push_back(row.scores);
  text_rules.add(token);
  events.finished = finish(token, position + 1);
  complete(text_rules, events);
}

int DecodeTask::append_forced(int position, TextRules& text_rules, Events& events) const {
  int n = 0;
  while (!events.finished) {
    const std::vector<TokenId> forced = text_rules.forced();
    if (forced.empty()) break;
    for (const TokenId token : forced) {
      events.revealed.push_back({position + n, token, 0.0f, 1.0f});
      events.committed.push_back(token);
      text_rules.add(token);
      events.finished = finish(token, position + ++n);
      if (events.finished) break;
    }
    complete(text_rules, events);
  }
  return n;
}

Reveal DecodeTask::reveal(int position, const RowStats& row) const {
  const bool sampled = sampling.temperature > 0.0f;
  return {position, choose(row), row.entropy,
          sampled ? row.sampled_probability : row.top_probability};
}

void check_rows(const Plan& plan, std::span<const RowStats> stats) {
  const int expected = plan.n_outputs();
  SBD_CHECK(static_cast<int>(stats.size()) == expected, "expected statistics of {} rows, got {}",
            expected, stats.size());
}

std::string how_to_fit(int n_ctx, int n_ctx_limit, int sliding_window) {
  if (n_ctx < n_ctx_limit) {
    return format("shorten it or raise `n_ctx` (the model takes {})", n_ctx_limit);
  }
  if (sliding_window == 0) return "shorten it";
  return format("shorten it: this engine computes no more than the model's sliding window of {}",
                sliding_window);
}

void check_task(const DecodeTask& task) {
  SBD_CHECK(!task.prompt.empty(), "expected a prompt of at least one token, got an empty one");
  SBD_CHECK(static_cast<int>(task.prompt.size()) < task.n_ctx,
            "expected a prompt shorter than the context of {} tokens, got {} tokens: {}",
            task.n_ctx, task.prompt.size(),
            how_to_fit(task.n_ctx, task.n_ctx_limit, task.sliding_window));
  SBD_CHECK(task.max_tokens >= 1, "expected `max_tokens` >= 1, got {}", task.max_tokens);
  const Sampling& sampling = task.sampling;
  SBD_CHECK(sampling.temperature >= 0.0f && std::isfinite(sampling.temperature),
            "expected a finite `temperature` >= 0 (0 takes the most probable token), got {}",
            sampling.temperature);
  SBD_CHECK(sampling.top_k >= 0, "expected `top_k` >= 0 (0 keeps all tokens), got {}",
            sampling.top_k);
  SBD_CHECK(sampling.top_p > 0.0f && sampling.top_p <= 1.0f,
            "expected `top_p` above 0 and at most 1 (1 keeps all tokens), got {}", sampling.top_p);
  SBD_CHECK(sampling.min_p >= 0.0f && sampling.min_p <= 1.0f,
            "expected `min_p` from 0 to 1 (0 keeps all tokens), got {}", sampling.min_p);
  check_rule_options(task.rules);
}

}  // namespace sbd
