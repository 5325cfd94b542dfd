// Statistics behind the LM head against float64, and draws against the CPU's.
#include <cmath>

#include "backend/cpu/kernels.h"
#include "cuda_check.h"
#include "draw_one.h"

namespace sbd::cuda {
namespace {

using namespace test;

using Logits = std::vector<std::vector<float>>;  // [rows][vocab]

// A head whose logits are chosen: weights [vocab, rows] in float32 and one-hot inputs.
struct ChosenHead {
  ChosenHead(CudaBackend& backend, const Logits& logits) : n_rows(static_cast<int>(logits.size())) {
    const int vocab = static_cast<int>(logits[0].size());
    std::vector<float> columns;
    for (int id = 0; id < vocab; ++id) {
      for (const auto& row : logits) columns.push_back(row[static_cast<std::size_t>(id)]);
    }
    weight = backend.load_weight(f32_tensor("output.weight", {vocab, n_rows}, columns).view());
    std::vector<float> one_hot(logits.size() * logits.size());
    for (std::size_t row = 0; row < logits.size(); ++row) one_hot[row * (logits.size() + 1)] = 1;
    x = backend.upload(one_hot);
  }

  std::vector<OutputRow> outputs(const Sampling& sampling) const {
    std::vector<OutputRow> rows;
    for (int row = 0; row < n_rows; ++row) rows.push_back({row, 100 + row, sampling});
    return rows;
  }
  std::vector<RowStats> stats(CudaBackend& backend, TokenId mask,
                              const Sampling& sampling = {}) const {
    std::vector<RowStats> result(static_cast<std::size_t>(n_rows));
    begin_rows(backend, n_rows);
    backend.head_stats({x.get()}, *weight, outputs(sampling), mask, result);
    return result;
  }

  int n_rows;
  std::unique_ptr<Weight> weight;
  Buffer x;
};

std::string wrong_field(const RowStats& stats, const std::vector<float>& logits, TokenId mask) {
  TokenId argmax = -1;
  double second = -INFINITY;
  for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) {
    if (id == mask) continue;
    const double l = logits[static_cast<std::size_t>(id)];
    if (argmax < 0 || l > logits[static_cast<std::size_t>(argmax)]) {
      if (argmax >= 0) second = logits[static_cast<std::size_t>(argmax)];
      argmax = id;
    } else {
      second = std::max(second, l);
    }
  }
  const double top = logits[static_cast<std::size_t>(argmax)];
  double sum = 0, weighted = 0;
  for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) {
    if (id == mask) continue;
    const double below = logits[static_cast<std::size_t>(id)] - top;
    sum += std::exp(below);
    weighted += below * std::exp(below);
  }
  const double entropy = std::log(sum) - weighted / sum;
  const auto off = [](double a, double b, double tolerance) {
    return !(std::abs(a - b) <= tolerance);
  };
  if (stats.argmax != argmax) return "argmax";
  if (off(stats.top_probability, 1 / sum, 2e-6)) return "top_probability";
  if (off(stats.margin, (1 - std::exp(second - top)) / sum, 2e-6)) return "margin";
  if (off(stats.log_z, top + std::log(sum), 2e-6 + std::abs(top) * 2e-7)) return "log_z";
  if (off(stats.entropy, entropy, 1e-5 * (1 + entropy))) return "entropy";
  if (!(stats.entropy >= 0)) return "entropy is negative";
  if (stats.sampled != argmax) return "sampled";
  return "";
}

Logits kinds_of_rows(int vocab, Random& random) {
  const auto n = static_cast<std::size_t>(vocab);
  Logits logits;
  for (const double spread : {0.1, 3.0, 20.0}) logits.push_back(random.floats(n, -spread, spread));
  logits.emplace_back(n, 1.25f);
  for (const int at : {0, vocab - 1, random.below(vocab)}) {
    logits.emplace_back(n, -40.0f);
    logits.back()[static_cast<std::size_t>(at)] = 40.0f;
  }
  logits.push_back(random.floats(n, -1, 1));
  for (int i = 0; i < 3; ++i) logits.back()[static_cast<std::size_t>(random.below(vocab))] = 5.0f;
  logits.push_back(random.floats(n, -1000, -900));
  return logits;
}

TEST(cuda_head_stats_of_every_vocabulary_and_mask) {
  CudaBackend backend(0);
  for (const int vocab : {1, 2, 17, 255, 4095, 4096, 4097, 9000}) {
    Random random(static_cast<std::uint64_t>(vocab));
    const Logits logits = kinds_of_rows(vocab, random);
    const ChosenHead head(backend, logits);
    for (const TokenId mask : {-1, 0, vocab - 1}) {
      if (vocab == 1 && mask == 0) continue;  // no token would be left
      const auto stats = head.stats(backend, mask);
      for (std::size_t row = 0; row < logits.size(); ++row) {
        const std::string wrong = wrong_field(stats[row], logits[row], mask);
        CHECK_IN("vocabulary " + std::to_string(vocab) + ", mask " + std::to_string(mask) +
                     ", row " + std::to_string(row) + ": " + wrong,
                 wrong.empty());
      }
    }
    begin_rows(backend, head.n_rows);
    std::vector<float> raw(logits.size() * static_cast<std::size_t>(vocab));
    backend.head_logits({head.x.get()}, *head.weight, head.outputs({}), raw.data());
    for (std::size_t row = 0; row < logits.size(); ++row) {
      CHECK(std::equal(logits[row].begin(), logits[row].end(),
                       raw.begin() + static_cast<std::ptrdiff_t>(row) * vocab));
    }
  }
}

// Weights of every type in tiles of every size: one-hot rows make logits of their columns, exactly.
TEST(cuda_head_stats_of_every_type_and_number_of_rows) {
  CudaBackend backend(0);
  Random random(14);
  constexpr int cols = 64;
  const int vocab = many_features(65), mask = 200;
  for (const DType dtype : kTypes) {
    const auto stored = random_matrix("output.weight", dtype, vocab, cols, 5.0, random);
    const auto head = backend.load_weight(stored.view());
    const auto values = values_of(stored);
    Logits columns(cols);
    for (std::size_t i = 0; i < values.size(); ++i) {
      columns[i % cols].push_back(static_cast<float>(values[i]));
    }
    for (const int rows : {1, 9, 20, 64, 65, 150, 300}) {
      std::vector<float> one_hot(static_cast<std::size_t>(rows * cols));
      std::vector<OutputRow> outputs, drawn;
      for (int row = 0; row < rows; ++row) {
        one_hot[static_cast<std::size_t>(row * cols + row * 7 % cols)] = 1;
        outputs.push_back({row, row, {}});
        drawn.push_back({row, row, {.temperature = 0.5f}});
      }
      const Buffer x = backend.upload(one_hot);
      std::vector<RowStats> stats(static_cast<std::size_t>(rows)), of_drawn = stats;
      begin_rows(backend, rows);
      backend.head_stats({x.get()}, *head, outputs, mask, stats);
      begin_rows(backend, rows);
      backend.head_stats({x.get()}, *head, drawn, mask, of_drawn);  // whose logits are in memory
      for (int row = 0; row < rows; ++row) {
        const auto i = static_cast<std::size_t>(row);
        const std::string wrong =
            wrong_field(stats[i], columns[static_cast<std::size_t>(row * 7 % cols)], mask);
        CHECK_IN(std::string(name(dtype)) + ", row " + std::to_string(row) + " of " +
                     std::to_string(rows) + ": " + wrong,
                 wrong.empty());
        CHECK(of_drawn[i].argmax == stats[i].argmax && of_drawn[i].entropy == stats[i].entropy &&
              of_drawn[i].margin == stats[i].margin && of_drawn[i].log_z == stats[i].log_z);
      }
    }
  }
}

// Only some rows of the input, in any number.
TEST(cuda_head_takes_the_wanted_rows) {
  CudaBackend backend(0);
  Random random(11);
  constexpr int rows = 150, cols = 64, vocab = 300;
  for (const DType dtype : kTypes) {
    const auto stored = random_matrix("output.weight", dtype, vocab, cols, 0.3, random);
    const auto head = backend.load_weight(stored.view());
    const Buffer x = backend.upload(random.floats(rows * cols, -1, 1));
    std::vector<OutputRow> outputs;
    for (int row = 0; row < rows; ++row) outputs.push_back({row, row, {}});
    std::vector<RowStats> all(rows), some(2);
    begin_rows(backend, rows);
    backend.head_stats({x.get()}, *head, outputs, 7, all);
    const OutputRow two[] = {outputs[3], outputs[140]};
    begin_rows(backend, rows);
    backend.head_stats({x.get()}, *head, two, 7, some);
    CHECK_EQ(some[0].argmax, all[3].argmax);
    CHECK_EQ(some[0].entropy, all[3].entropy);
    CHECK_EQ(some[1].argmax, all[140].argmax);
    CHECK_EQ(some[1].log_z, all[140].log_z);
  }
}

TEST(cuda_draws_are_the_cpus) {
  CudaBackend backend(0);
  const cpu::Kernels& kernels = *all_kernels().front();
  Random random(12);
  const TokenId mask = 600;
  constexpr int vocab = 9500;
  Logits logits = {random.floats(vocab, -2, 2), random.floats(vocab, -6, 6)};
  logits.emplace_back(vocab, 1.0f);  // ties: the lower id is kept
  logits[1][4000] = -0.0f;
  const ChosenHead head(backend, logits);
  const auto greedy = head.stats(backend, mask);
  int drawn_tokens = 0, same = 0;
  for (const auto& [temperature, top_k, top_p] :
       std::vector<std::tuple<float, int, float>>{{1.0f, 0, 1.0f},
                                                  {0.8f, 40, 0.9f},
                                                  {0.7f, 0, 0.5f},
                                                  {1.5f, 3, 1.0f},
                                                  {1e-20f, 0, 1.0f},
                                                  {1e30f, 5, 0.7f}}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      const Sampling sampling{.temperature = temperature,
                              .top_k = top_k,
                              .top_p = top_p,
                              .seed = seed,
                              .sample_index = seed % 2,
                              .draw = seed};
      const auto stats = head.stats(backend, mask, sampling);
      for (std::size_t row = 0; row < logits.size(); ++row) {
        std::vector<float> masked = logits[row];
        masked[mask] = cpu::kMinusInfinity;
        const cpu::Sample drawn =
            cpu::draw_one(kernels, masked, sampling, 100 + static_cast<int>(row));
        ++drawn_tokens;
        same += stats[row].sampled == drawn.token;
        if (stats[row].sampled == drawn.token) {
          CHECK_NEAR(stats[row].sampled_probability, drawn.probability, 2e-5 * drawn.probability);
        }
        CHECK_EQ(stats[row].argmax, greedy[row].argmax);
        CHECK_EQ(stats[row].entropy, greedy[row].entropy);  // untempered
      }
    }
  }
  check_draws(__FILE__, __LINE__, same, drawn_tokens, 0.9);
}

// What this backend does not compute is refused, not left out.
TEST(cuda_head_refuses_what_it_does_not_compute) {
  CudaBackend backend(0);
  const ChosenHead head(backend, {{1.0f, 2.0f}});
  std::vector<RowStats> stats(1);
  for (const OutputRow& row :
       {OutputRow{0, 0, {.temperature = 1, .min_p = 0.1f}}, OutputRow{0, 0, {}, {.n_best = 0}},
        OutputRow{0, 0, {}, {std::make_shared<LogitRules>()}}}) {
    begin_rows(backend, 1);
    CHECK_THROWS_WITH(
        backend.head_stats({head.x.get()}, *head.weight, {&row, 1}, -1, stats),
        "biases, penalties, allowed tokens, min-p and log-probabilities are not computed "
        "on a GPU yet: use device cpu");
  }
}

TEST(cuda_head_refuses_logits_that_are_not_finite) {
  CudaBackend backend(0);
  Random random(13);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    Logits logits = {random.floats(600, -1, 1), random.floats(600, -1, 1)};
    const ChosenHead fine(backend, logits);
    fine.stats(backend, 3);
    const Buffer x = backend.upload(std::vector<float>{1, 0, 0, bad});
    std::vector<RowStats> stats(2);
    begin_rows(backend, 2);
    CHECK_THROWS_WITH(backend.head_stats({x.get()}, *fine.weight, fine.outputs({}), 3, stats),
                      "the model computed logits that are NaN or infinite");
  }
  const ChosenHead lowest(backend, {{-2e30f, -3e30f}});
  CHECK_THROWS_WITH(lowest.stats(backend, -1), "NaN or infinite");
}

}  // namespace
}  // namespace sbd::cuda
