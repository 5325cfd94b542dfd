// CpuBackend: the LM head. The vocabulary is cut into fixed runs; a task computes one run's logits
// for some rows into a tile that stays in cache and reduces them there, so logits are written to
// memory only for rows that are sampled. Runs are merged in order: the result depends on no thread
// count.
#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"
#include "backend/cpu/sampler.h"

namespace sbd::cpu {

namespace {

constexpr int kRunPanels = 16;
constexpr int kRun = kRunPanels * kPanel;  // tokens
constexpr int kRowBlock = 64;              // rows a tile holds
// Logits to sample from and best tokens that are kept at a time: 128 MiB, or one row's.
constexpr Index kHeadFloats = 32 << 20;

// Entropy of a softmax with m the highest logit, s = sum of exp(l - m) and w = sum of
// (l - m) exp(l - m): log(s) - w / s. NaN where a logit was not finite, or where none was above the
// value that stands for an excluded token.
template <typename At>
RowStats merge(int n_runs, const At& at) {
  float top = kMinusInfinity;
  float second = kMinusInfinity;
  float not_finite = 0;
  RowStats stats;
  for (int i = 0; i < n_runs; ++i) {
    const RunStats& run = at(i);
    not_finite += run.not_finite;
    if (run.max > top) {
      second = std::max(top, run.second);
      top = run.max;
      stats.argmax = i * kRun + run.argmax;
    } else {
      second = std::max(second, run.max);
    }
  }
  double sum = top > kMinusInfinity ? not_finite : std::nan("");
  double weighted = 0;
  for (int i = 0; i < n_runs; ++i) {
    const RunStats& run = at(i);
    const double below = static_cast<double>(run.max) - top;
    const double factor = std::exp(below);
    sum += factor * run.sum;
    weighted += factor * (run.weighted_sum + below * run.sum);
  }
  const double entropy = std::log(sum) - weighted / sum;
  stats.top_probability = static_cast<float>(1.0 / sum);
  stats.margin = static_cast<float>((1.0 - std::exp(static_cast<double>(second) - top)) / sum);
  stats.log_z = static_cast<float>(top + std::log(sum));
  stats.entropy = static_cast<float>(entropy < 0 ? 0.0 : entropy);
  stats.sampled = stats.argmax;
  stats.sampled_probability = stats.top_probability;
  return stats;
}

// The tokens [first, first + n) under the rules; `logits` are theirs.
void apply(const LogitRules& rules, int first, int n, float* logits) {
  const auto begin = std::ranges::lower_bound(rules.adjustments, first, {}, &Adjustment::token);
  for (auto one = begin; one != rules.adjustments.end() && one->token < first + n; ++one) {
    float& logit = logits[one->token - first];
    logit += one->bias;
    logit = (logit > 0 ? logit / one->factor : logit * one->factor) - one->penalty;
    logit = std::max(logit, kMinusInfinity);  // NaN stays
  }
  if (rules.allowed.empty()) return;
  for (int i = 0; i < n; ++i) {
    const int token = first + i;
    if ((rules.allowed[token / 32] >> (token % 32) & 1) == 0) logits[i] = kMinusInfinity;
  }
}

struct MoreProbable {
  bool operator()(const TokenScore& a, const TokenScore& b) const {
    return a.logprob > b.logprob || (a.logprob == b.logprob && a.token < b.token);
  }
};

// The best of a run, as far as `best` has room; what is left of it is minus infinity.
void best_of_run(const float* logits, int first, int n, std::span<TokenScore> best) {
  std::ranges::fill(best, TokenScore{-1, kMinusInfinity});
  std::size_t kept = 0;
  for (int i = 0; i < n && !best.empty(); ++i) {
    const TokenScore one{first + i, logits[i]};
    if (kept == best.size() && !MoreProbable{}(one, best.back())) continue;
    if (kept < best.size()) ++kept;
    const auto end = best.begin() + static_cast<std::ptrdiff_t>(kept) - 1;
    const auto place = std::upper_bound(best.begin(), end, one, MoreProbable{});
    std::move_backward(place, end, end + 1);
    *place = one;
  }
}

// A run's logits as the model says, padded with minus infinity: of a row that is scored.
void score_run(const Kernels& kernels, std::span<const float> logits, int first, int n,
               TokenScore given, RunScores& scores, std::span<TokenScore> best) {
  kernels.run_stats(logits.data(), static_cast<int>(logits.size()), &scores.stats);
  best_of_run(logits.data(), first, n, best);
  scores.before = 0;
  for (int i = 0; i < n && given.token >= 0; ++i) {
    scores.before += MoreProbable{}({first + i, logits[i]}, given) ? 1 : 0;
  }
}

// `token`: which the row's score is of, with its logit; `best`: of the runs, n_best apart.
RowScores merge_scores(const RowAsk& ask, TokenScore token, std::span<const RunScores> runs,
                       const TokenScore* best, Index n_best) {
  const float log_z = merge(static_cast<int>(runs.size()), [&](int run) -> const RunStats& {
                        return runs[run].stats;
                      }).log_z;
  RowScores scores{{token.token, token.logprob - log_z}, -1, {}};
  if (ask.given >= 0) {
    scores.rank = 0;
    for (const RunScores& run : runs) scores.rank += run.before;
  }
  for (std::size_t run = 0; run < runs.size(); ++run, best += n_best) {
    scores.best.insert(scores.best.end(), best, best + ask.n_best);
  }
  std::erase_if(scores.best, [](const TokenScore& one) { return one.token < 0; });
  const auto n = std::min(scores.best.size(), static_cast<std::size_t>(ask.n_best));
  const auto middle = scores.best.begin() + static_cast<std::ptrdiff_t>(n);
  std::partial_sort(scores.best.begin(), middle, scores.best.end(), MoreProbable{});
  scores.best.erase(middle, scores.best.end());
  for (TokenScore& one : scores.best) one.logprob -= log_z;
  return scores;
}

}  // namespace

// Parts of the rows, whose logits to sample from and best tokens fit into kHeadFloats.
void CpuBackend::head_stats(const Input& input, const Weight& head,
                            std::span<const OutputRow> outputs, TokenId mask_token,
                            std::span<RowStats> stats) {
  const Index n_runs = (head.rows() + kRun - 1) / kRun;
  for (std::size_t begin = 0, end = 0; begin < outputs.size(); begin = end) {
    for (Index n_floats = 0; end < outputs.size(); ++end) {
      const OutputRow& output = outputs[end];
      n_floats += output.sampling.temperature > 0 ? head.rows() : 0;
      n_floats += 2 * n_runs * std::max(0, output.ask.n_best);
      if (n_floats > kHeadFloats && end > begin) break;
    }
    head_stats_part(input, head, outputs.subspan(begin, end - begin), mask_token,
                    stats.subspan(begin, end - begin));
  }
  check_finite(stats);
}

// Which rows keep logits and which are scored, and room for that.
void CpuBackend::place_rows(std::span<const OutputRow> outputs, Index vocab, Index n_runs) {
  kept_.assign(outputs.size(), -1);
  scored_.assign(outputs.size(), -1);
  Index n_kept = 0, n_scored = 0;
  n_best_ = 0;
  for (std::size_t row = 0; row < outputs.size(); ++row) {
    if (outputs[row].sampling.temperature > 0) kept_[row] = n_kept++ * vocab;
    if (outputs[row].ask.n_best < 0) continue;
    scored_[row] = n_scored++;
    n_best_ = std::max(n_best_, static_cast<Index>(outputs[row].ask.n_best));
  }
  grown(logits_, n_kept * vocab);
  if (n_kept > 0) {
    for (auto& ids : token_ids_) ids.resize(static_cast<std::size_t>(vocab));
  }
  grown(run_scores_, n_scored * n_runs);
  grown(best_, n_scored * n_runs * n_best_);
  grown(token_logits_, n_scored);
}

void CpuBackend::head_stats_part(const Input& input, const Weight& head,
                                 std::span<const OutputRow> outputs, TokenId mask_token,
                                 std::span<RowStats> stats) {
  const PackedWeight& weight = PackedWeight::of(head);
  const int n_rows = static_cast<int>(outputs.size());
  const Index vocab = head.rows();
  const int n_runs = (head.rows() + kRun - 1) / kRun;
  const int n_blocks = (n_rows + kRowBlock - 1) / kRowBlock;
  const Linear linear_head{&head, nullptr, nullptr};
  const Activations activations = prepare(input, {&linear_head, 1}, outputs);

  const std::size_t n_stats = outputs.size() * static_cast<std::size_t>(n_runs);
  if (run_stats_.size() < n_stats) run_stats_.resize(n_stats);
  for (auto& tile : tiles_) tile.resize(std::size_t{kRowBlock} * kRun);
  place_rows(outputs, vocab, n_runs);
  const bool scored = std::ranges::any_of(scored_, [](Index at) { return at >= 0; });

  const auto task_of = [&](int first_row, int n, int thread, int end_panel) {
    LinearTask t{weight.matrix(),
                 activations,
                 0,
                 nullptr,
                 tiles_[thread].data(),
                 kRun,
                 false,
                 weight.matrix().data + Index{end_panel} * weight.matrix().panel_bytes,
                 1.0f};
    t.x.first_row = first_row;
    t.n_rows = n;
    return t;
  };
  // One token's logit in a row, without any rule.
  const auto logit_of = [&](int row, TokenId token, int thread) {
    const int panel = token / kPanel;
    const LinearTask t = task_of(row, 1, thread, panel + 1);
    kernels_.linear(t, panel, panel + 1);
    return t.out[token % kPanel];
  };
  if (scored) {
    pool_.run(n_rows, [&](int row, int thread) {
      if (scored_[row] < 0 || outputs[row].ask.given < 0) return;
      token_logits_[scored_[row]] = logit_of(row, outputs[row].ask.given, thread);
    });
  }

  pool_.run(n_runs * n_blocks, [&](int task, int thread) {
    const int run = task / n_blocks;
    const int first_token = run * kRun;
    const int n_tokens = std::min(kRun, head.rows() - first_token);
    const int padded = (n_tokens + kLanes - 1) / kLanes * kLanes;
    const int panel = run * kRunPanels;
    const int mask = mask_token < first_token ? n_tokens : mask_token - first_token;
    const int first_row = task % n_blocks * kRowBlock;
    const LinearTask t =
        task_of(first_row, std::min(kRowBlock, n_rows - first_row), thread, panel + kRunPanels);
    kernels_.linear(t, panel, std::min(panel + kRunPanels, weight.n_panels()));
    for (int i = 0; i < t.n_rows; ++i) {
      const int row = first_row + i;
      const RowAsk& ask = outputs[row].ask;
      float* logits = t.out + i * t.out_stride;
      std::fill(logits + n_tokens, logits + padded, kMinusInfinity);
      if (scored_[row] >= 0) {
        const Index at = scored_[row] * n_runs + run;
        score_run(kernels_, std::span(logits, static_cast<std::size_t>(padded)), first_token,
                  n_tokens, {ask.given, token_logits_[scored_[row]]}, run_scores_[at],
                  std::span(best_.data() + at * n_best_, static_cast<std::size_t>(ask.n_best)));
      }
      if (mask < n_tokens) logits[mask] = kMinusInfinity;
      if (ask.rules) apply(*ask.rules, first_token, n_tokens, logits);
      kernels_.run_stats(logits, padded, &run_stats_[Index{run} * n_rows + row]);
      if (kept_[row] >= 0) {
        std::copy(logits, logits + n_tokens, logits_.data() + kept_[row] + first_token);
      }
    }
  });

  pool_.run(n_rows, [&](int row, int thread) {
    stats[row] = merge(
        n_runs, [&](int run) -> const RunStats& { return run_stats_[Index{run} * n_rows + row]; });
    if (std::isnan(stats[row].entropy)) return;
    if (kept_[row] >= 0) {
      const std::span<const float> logits(logits_.data() + kept_[row],
                                          static_cast<std::size_t>(vocab));
      const Sample drawn = sample(kernels_, logits, outputs[row].sampling, outputs[row].position,
                                  token_ids_[thread]);
      stats[row].sampled = drawn.token;
      stats[row].sampled_probability = drawn.probability;
    }
    if (scored_[row] >= 0 && outputs[row].ask.given < 0) {
      const TokenId token = kept_[row] >= 0 ? stats[row].sampled : stats[row].argmax;
      token_logits_[scored_[row]] = logit_of(row, token, thread);
    }
  });

  for (int row = 0; row < n_rows; ++row) {
    if (scored_[row] < 0) continue;
    const RowAsk& ask = outputs[row].ask;
    const TokenId own = kept_[row] >= 0 ? stats[row].sampled : stats[row].argmax;
    const Index first = scored_[row] * n_runs;
    stats[row].scores = std::make_shared<RowScores>(
        merge_scores(ask, {ask.given < 0 ? own : ask.given, token_logits_[scored_[row]]},
                     std::span(run_scores_.data() + first, static_cast<std::size_t>(n_runs)),
                     best_.data() + first * n_best_, n_best_));
    // A logit that is not finite may be one that the rules exclude.
    if (std::isnan(stats[row].scores->token.logprob)) stats[row].entropy = std::nanf("");
  }
}

void CpuBackend::head_logits(const Input& input, const Weight& head,
                             std::span<const OutputRow> outputs, float* logits) {
  if (outputs.empty()) return;
  const Linear linear_head{&head, nullptr, logits};
  const Interval all{0, static_cast<int>(outputs.size())};
  const Product product{linear_head, prepare(input, {&linear_head, 1}, outputs), {&all, 1}};
  multiply({&product, 1}, {});
}

}  // namespace sbd::cpu
