// An LM head whose rows are asked, and what statistics, draws and scores of its logits are in
// float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "begin_rows.h"
#include "reference.h"

namespace sbd::test {

using Logits = std::vector<std::vector<float>>;  // [rows][vocab]

// A head and its input, of which any rows may be wanted.
struct HeadInput {
  std::unique_ptr<Weight> weight;
  Buffer x;
  int n_rows;

  std::vector<RowStats> stats(Backend& backend, const std::vector<OutputRow>& outputs,
                              TokenId mask) const {
    std::vector<RowStats> result(outputs.size());
    begin_rows(backend, n_rows);
    backend.head_stats({x.get()}, *weight, outputs, mask, result);
    return result;
  }
  std::vector<OutputRow> all_rows(const Sampling& sampling = {}) const {
    std::vector<OutputRow> rows;
    for (int row = 0; row < n_rows; ++row) rows.push_back({row, 100 + row, sampling});
    return rows;
  }
  std::vector<RowStats> stats(Backend& backend, TokenId mask, const Sampling& sampling = {}) const {
    return stats(backend, all_rows(sampling), mask);
  }
  Logits logits(Backend& backend) const {
    const auto vocab = static_cast<std::size_t>(weight->rows());
    std::vector<float> raw(static_cast<std::size_t>(n_rows) * vocab);
    begin_rows(backend, n_rows);
    backend.head_logits({x.get()}, *weight, all_rows(), raw.data());
    Logits rows;
    for (auto at = raw.begin(); at != raw.end(); at += weight->rows()) {
      rows.emplace_back(at, at + weight->rows());
    }
    return rows;
  }
};

// Logits are chosen: weights [vocab, rows] in float32 and one-hot inputs make each of them one
// product with 1 and zeros.
inline HeadInput chosen_head(Backend& backend, const Logits& logits) {
  const int rows = static_cast<int>(logits.size()), vocab = static_cast<int>(logits[0].size());
  std::vector<float> columns;
  for (int id = 0; id < vocab; ++id) {
    for (const auto& row : logits) columns.push_back(row[static_cast<std::size_t>(id)]);
  }
  std::vector<float> one_hot(logits.size() * logits.size());
  for (std::size_t row = 0; row < logits.size(); ++row) one_hot[row * (logits.size() + 1)] = 1;
  return {backend.load_weight(f32_tensor("output.weight", {vocab, rows}, columns).view()),
          backend.upload(one_hot), rows};
}

inline HeadInput random_head(Backend& backend, DType dtype, int rows, int vocab, double size,
                             Random& random) {
  const int cols = short_row(dtype);
  const auto stored = random_matrix("output.weight", dtype, vocab, cols, size, random);
  return {backend.load_weight(stored.view()),
          backend.upload(random.floats(static_cast<std::size_t>(rows * cols), -1, 1)), rows};
}

// Rows of every kind: spread, flat, peaked by a gap of 80, with ties at the top within and across
// runs of the vocabulary, far from zero.
inline Logits kinds_of_rows(int vocab, Random& random) {
  const auto n = static_cast<std::size_t>(vocab);
  const auto any = [&] { return static_cast<std::size_t>(random.below(vocab)); };
  Logits logits;
  for (const double spread : {0.1, 3.0, 20.0}) logits.push_back(random.floats(n, -spread, spread));
  logits.emplace_back(n, 1.25f);
  for (const std::size_t at : {std::size_t{0}, n - 1, any()}) {
    logits.emplace_back(n, -40.0f);
    logits.back()[at] = 40.0f;
  }
  logits.push_back(random.floats(n, -1, 1));
  for (int i = 0; i < 3; ++i) logits.back()[any()] = 5.0f;
  logits.push_back(random.floats(n, 900, 1000));
  logits.push_back(random.floats(n, -1000, -900));
  return logits;
}

// The logits that a row's statistics are of: without the mask token and what its rules exclude.
inline std::vector<double> ruled(const std::vector<float>& logits, TokenId mask,
                                 const LogitRules& rules = {}) {
  std::vector<double> result(logits.begin(), logits.end());
  for (const Adjustment& one : rules.adjustments) {
    double& logit = result[static_cast<std::size_t>(one.token)];
    logit += one.bias;
    logit = logit > 0 ? logit / one.factor : logit * one.factor;
    logit -= one.penalty;
  }
  for (std::size_t id = 0; id < result.size(); ++id) {
    const bool allowed = rules.allowed.empty() || (rules.allowed[id / 32] >> (id % 32) & 1u) != 0;
    if (!allowed || static_cast<TokenId>(id) == mask) result[id] = -INFINITY;
  }
  return result;
}

// What is wrong of a row's statistics, with its values; "" where nothing is. `relative`: of sums of
// exponentials; `rounding`: of the logits, absolute.
inline std::string wrong_field(const RowStats& stats, const std::vector<double>& logits,
                               double relative, double rounding = 0) {
  relative += 2 * rounding;
  const auto highest = std::ranges::max_element(logits);
  const double top = *highest;
  double second = -INFINITY;
  for (auto at = logits.begin(); at != logits.end(); ++at) {
    if (at != highest) second = std::max(second, *at);
  }
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - top);
  const double log_z = top + std::log(sum);
  double entropy = 0;
  double spread = 0;  // mean distance from the top: errors of exp and of sums weigh by it
  for (const double logit : logits) {
    if (logit == -INFINITY) continue;
    const double log_p = logit - log_z;
    entropy -= std::exp(log_p) * log_p;
    spread += std::exp(log_p) * (top - logit);
  }
  const double margin = (1 - std::exp(second - top)) / sum;
  const auto argmax = static_cast<double>(highest - logits.begin());
  const struct {
    const char* name;
    double actual, expected, tolerance;
  } fields[] = {
      {"argmax", static_cast<double>(stats.argmax), argmax, 0},
      {"top_probability", stats.top_probability, 1 / sum, relative / sum},
      {"margin", stats.margin, margin, 2 * relative * margin + 2 * rounding / sum},
      {"log_z", stats.log_z, log_z, relative + std::abs(log_z) * 2 * kEps},
      {"entropy", stats.entropy, entropy, relative * (1 + 2 * spread) + entropy * kEps},
  };
  for (const auto& field : fields) {
    if (!(std::abs(field.actual - field.expected) <= field.tolerance)) {
      return std::string(field.name) + " is " + show(field.actual) + ", expected " +
             show(field.expected) + " +- " + show(field.tolerance);
    }
  }
  return stats.entropy >= 0.0f ? "" : "entropy is negative";
}

// The same of a row that is not sampled.
inline std::string wrong_greedy(const RowStats& stats, const std::vector<double>& logits,
                                double relative) {
  const std::string wrong = wrong_field(stats, logits, relative);
  if (!wrong.empty()) return wrong;
  if (stats.sampled != stats.argmax) return "sampled is not the argmax";
  return stats.sampled_probability == stats.top_probability ? "" : "sampled_probability";
}

// A drawn token has its probability after the filters, which is above 0.
inline std::string wrong_draw(const RowStats& stats, const std::vector<double>& logits,
                              const Sampling& sampling) {
  const double p = filtered(logits, sampling)[static_cast<std::size_t>(stats.sampled)];
  if (p > 0 && std::abs(stats.sampled_probability - p) <= 2e-5 * p) return "";
  return "drawn " + show(stats.sampled) + " of probability " + show(p) + ", said to be " +
         show(stats.sampled_probability);
}

// Scores are of the logits as the model says them, the mask token's among them.
inline std::string wrong_scores(const RowStats& stats, const RowAsk& ask,
                                const std::vector<float>& logits) {
  if ((stats.scores != nullptr) != (ask.n_best >= 0))
    return "scores that nobody asked for, or none";
  if (ask.n_best < 0) return "";
  const RowScores& scores = *stats.scores;
  double sum = 0;
  const double top = *std::ranges::max_element(logits);
  for (const float logit : logits) sum += std::exp(logit - top);
  const auto is_right = [&](const TokenScore& one) {
    const double expected = logits[static_cast<std::size_t>(one.token)] - top - std::log(sum);
    return std::abs(one.logprob - expected) <= 3e-6 + 4 * kEps * std::abs(top);
  };
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](TokenId a, TokenId b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  if (scores.token.token != (ask.given >= 0 ? ask.given : stats.sampled)) return "the token";
  if (!is_right(scores.token)) return "the token's log-probability " + show(scores.token.logprob);
  const auto rank = std::ranges::find(order, ask.given) - order.begin();
  if (scores.rank != (ask.given >= 0 ? rank : -1)) return "rank " + show(scores.rank);
  if (static_cast<int>(scores.best.size()) != ask.n_best) return "the number of best tokens";
  for (std::size_t i = 0; i < scores.best.size(); ++i) {
    if (scores.best[i].token != order[i]) return "best token " + show(i);
    if (!is_right(scores.best[i])) return "the log-probability of best token " + show(i);
  }
  return "";
}

inline bool same(const RowStats& a, const RowStats& b) {
  RowStats plain = a;
  plain.scores = b.scores;
  if (!(plain == b) || (a.scores == nullptr) != (b.scores == nullptr)) return false;
  if (a.scores == nullptr) return true;
  const auto equal = [](const TokenScore& x, const TokenScore& y) {
    return x.token == y.token && x.logprob == y.logprob;
  };
  return equal(a.scores->token, b.scores->token) && a.scores->rank == b.scores->rank &&
         std::ranges::equal(a.scores->best, b.scores->best, equal);
}

}  // namespace sbd::test
