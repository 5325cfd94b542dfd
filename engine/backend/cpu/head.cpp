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

// Entropy of a softmax with m the highest logit, s = sum of exp(l - m) and w = sum of
// (l - m) exp(l - m): log(s) - w / s. NaN where a logit was not finite, or where none was above the
// value that stands for an excluded token.
RowStats merge(const RunStats* runs, int n_runs, Index stride) {
  float top = kMinusInfinity;
  float second = kMinusInfinity;
  float not_finite = 0;
  RowStats stats;
  for (int i = 0; i < n_runs; ++i) {
    const RunStats& run = runs[i * stride];
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
    const RunStats& run = runs[i * stride];
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

}  // namespace

void CpuBackend::head_stats(const Input& input, const Weight& head,
                            std::span<const OutputRow> outputs, TokenId mask_token,
                            std::span<RowStats> stats) {
  if (outputs.empty()) return;
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
  kept_.assign(outputs.size(), -1);
  Index n_kept = 0;
  for (int row = 0; row < n_rows; ++row) {
    if (outputs[row].sampling.temperature > 0) kept_[row] = n_kept++ * vocab;
  }
  const auto n_logits = static_cast<std::size_t>(n_kept * vocab);
  if (logits_.size() < n_logits) logits_.resize(n_logits);
  if (n_kept > 0) {
    for (auto& ids : token_ids_) ids.resize(static_cast<std::size_t>(vocab));
  }

  pool_.run(n_runs * n_blocks, [&](int task, int thread) {
    const int run = task / n_blocks;
    const int first_token = run * kRun;
    const int n_tokens = std::min(kRun, head.rows() - first_token);
    const int padded = (n_tokens + kLanes - 1) / kLanes * kLanes;
    const int panel = run * kRunPanels;
    const int mask = mask_token < first_token ? n_tokens : mask_token - first_token;
    LinearTask t{weight.matrix(),
                 activations,
                 0,
                 nullptr,
                 tiles_[thread].data(),
                 kRun,
                 false,
                 weight.matrix().data + Index{panel + kRunPanels} * weight.matrix().panel_bytes};
    t.x.first_row = task % n_blocks * kRowBlock;
    t.n_rows = std::min(kRowBlock, n_rows - t.x.first_row);
    kernels_.linear(t, panel, std::min(panel + kRunPanels, weight.n_panels()));
    for (int i = 0; i < t.n_rows; ++i) {
      const int row = t.x.first_row + i;
      float* logits = t.out + i * t.out_stride;
      std::fill(logits + n_tokens, logits + padded, kMinusInfinity);
      if (mask < n_tokens) logits[mask] = kMinusInfinity;
      kernels_.run_stats(logits, padded, &run_stats_[Index{run} * n_rows + row]);
      if (kept_[row] >= 0) {
        std::copy(logits, logits + n_tokens, logits_.data() + kept_[row] + first_token);
      }
    }
  });

  pool_.run(n_rows, [&](int row, int thread) {
    stats[row] = merge(&run_stats_[row], n_runs, n_rows);
    if (kept_[row] < 0 || std::isnan(stats[row].entropy)) return;
    const std::span<const float> logits(logits_.data() + kept_[row],
                                        static_cast<std::size_t>(vocab));
    const Sample drawn =
        sample(kernels_, logits, outputs[row].sampling, outputs[row].position, token_ids_[thread]);
    stats[row].sampled = drawn.token;
    stats[row].sampled_probability = drawn.probability;
  });
  check_finite(stats);
}

void CpuBackend::head_logits(const Input& input, const Weight& head,
                             std::span<const OutputRow> outputs, float* logits) {
  if (outputs.empty()) return;
  const Linear linear_head{&head, nullptr, logits};
  multiply(prepare(input, {&linear_head, 1}, outputs), static_cast<int>(outputs.size()),
           {&linear_head, 1}, /*accumulate=*/false, {});
}

}  // namespace sbd::cpu
