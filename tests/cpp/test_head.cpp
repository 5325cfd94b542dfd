// Statistics behind the LM head against float64, for every kernel table.
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "draw_one.h"
#include "reference.h"

namespace sbd::cpu {
namespace {

using namespace test;

using Logits = std::vector<std::vector<float>>;  // [rows][vocab]

// A head whose logits are chosen: weights [vocab, rows] and one-hot inputs, so that every logit is
// one product with 1 and zeros.
struct ChosenHead {
  int rows;
  int vocab;
  std::unique_ptr<Weight> weight;
  std::vector<float> x;

  ChosenHead(CpuBackend& backend, const Logits& logits)
      : rows(static_cast<int>(logits.size())), vocab(static_cast<int>(logits[0].size())) {
    std::vector<float> transposed;
    for (int id = 0; id < vocab; ++id) {
      for (const auto& row : logits) transposed.push_back(row[id]);
    }
    weight = backend.load_weight(f32_tensor("output.weight", {vocab, rows}, transposed).view());
    x.assign(static_cast<std::size_t>(rows * rows), 0.0f);
    for (int row = 0; row < rows; ++row) x[row * rows + row] = 1.0f;
  }

  std::vector<OutputRow> outputs(const Sampling& sampling) const {
    std::vector<OutputRow> result;
    for (int row = 0; row < rows; ++row) result.push_back({row, 100 + row, sampling});
    return result;
  }

  std::vector<RowStats> stats(CpuBackend& backend, TokenId mask,
                              const Sampling& sampling = {}) const {
    std::vector<RowStats> result(static_cast<std::size_t>(rows));
    backend.head_stats({x.data()}, *weight, outputs(sampling), mask, result);
    return result;
  }
};

// The first field that is wrong, with its values; "" where none is.
std::string wrong_field(const RowStats& stats, const std::vector<float>& logits, TokenId mask) {
  TokenId argmax = -1;
  double second = -INFINITY;
  for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) {
    if (id == mask) continue;
    if (argmax < 0 || logits[id] > logits[argmax]) {
      if (argmax >= 0) second = logits[argmax];
      argmax = id;
    } else if (logits[id] > second) {
      second = logits[id];
    }
  }
  double sum = 0;
  for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) {
    if (id != mask) sum += std::exp(static_cast<double>(logits[id]) - logits[argmax]);
  }
  const double log_z = logits[argmax] + std::log(sum);
  double entropy = 0;
  double spread = 0;  // mean distance from the top: errors of exp and of sums weigh by it
  for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) {
    if (id == mask) continue;
    const double log_p = logits[id] - log_z;
    entropy -= std::exp(log_p) * log_p;
    spread += std::exp(log_p) * (logits[argmax] - logits[id]);
  }
  const double margin = (1 - std::exp(second - logits[argmax])) / sum;

  // A run of 512 is summed in 16 lanes of 32 and added up in float64.
  const double relative = 2e-7 + 44 * kEps;
  const struct {
    const char* name;
    double actual, expected, tolerance;
  } fields[] = {
      {"argmax", static_cast<double>(stats.argmax), static_cast<double>(argmax), 0},
      {"sampled", static_cast<double>(stats.sampled), static_cast<double>(argmax), 0},
      {"top_probability", stats.top_probability, 1 / sum, relative / sum},
      {"sampled_probability", stats.sampled_probability, 1 / sum, relative / sum},
      {"margin", stats.margin, margin, 2 * relative * margin},
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

// Rows of every kind: spread, flat, peaked by a gap of 80, with ties at the top within and across
// runs of the vocabulary, far from zero.
Logits kinds_of_rows(int vocab, Random& random) {
  const auto n = static_cast<std::size_t>(vocab);
  Logits logits;
  for (const double spread : {0.1, 3.0, 20.0}) logits.push_back(random.floats(n, -spread, spread));
  logits.emplace_back(n, 1.25f);
  for (int at : {0, vocab - 1, random.below(vocab)}) {
    logits.emplace_back(n, -40.0f);
    logits.back()[at] = 40.0f;
  }
  logits.push_back(random.floats(n, -1, 1));
  for (int i = 0; i < 3; ++i) logits.back()[random.below(vocab)] = 5.0f;
  logits.push_back(random.floats(n, 900, 1000));
  logits.push_back(random.floats(n, -1000, -900));
  return logits;
}

TEST(head_stats_of_every_vocabulary_and_mask) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    for (const int vocab : {1, 2, 15, 16, 17, 511, 512, 513, 2000}) {
      Random random(static_cast<std::uint64_t>(vocab));
      const Logits logits = kinds_of_rows(vocab, random);
      const ChosenHead head(backend, logits);
      for (const TokenId mask : {-1, 0, vocab / 2, vocab - 1}) {
        if (vocab == 1 && mask == 0) continue;  // no token would be left
        const auto stats = head.stats(backend, mask);
        for (std::size_t row = 0; row < logits.size(); ++row) {
          const std::string wrong = wrong_field(stats[row], logits[row], mask);
          CHECK_IN(std::string(kernels->name) + ", vocabulary " + std::to_string(vocab) +
                       ", mask " + std::to_string(mask) + ", row " + std::to_string(row) + ": " +
                       wrong,
                   wrong.empty());
        }
      }
      std::vector<float> raw(logits.size() * static_cast<std::size_t>(vocab));
      backend.head_logits({head.x.data()}, *head.weight, head.outputs({}), raw.data());
      for (std::size_t row = 0; row < logits.size(); ++row) {
        CHECK(std::equal(logits[row].begin(), logits[row].end(),
                         raw.begin() + static_cast<std::ptrdiff_t>(row) * vocab));
      }
    }
  }
}

TEST(head_stats_check_finds_wrong_statistics) {
  const std::vector<float> logits = {0.5f, 2.0f, -1.0f};
  CpuBackend backend(1);
  const RowStats right = ChosenHead(backend, {logits}).stats(backend, -1)[0];
  CHECK_EQ(wrong_field(right, logits, -1), std::string());
  for (const auto field : {&RowStats::top_probability, &RowStats::margin, &RowStats::log_z,
                           &RowStats::entropy, &RowStats::sampled_probability}) {
    for (const float value : {0.0f, NAN, -(right.*field), right.*field * 1.0001f}) {
      RowStats wrong = right;
      wrong.*field = value;
      CHECK(!wrong_field(wrong, logits, -1).empty());
    }
  }
  CHECK(!wrong_field(right, logits, 1).empty());
}

TEST(head_stats_depend_on_no_thread_count_and_no_other_row) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    for (const DType type : kDTypes) {
      Random random(11);
      const int cols = short_row(type);
      const auto head = random_matrix("output.weight", type, 1200, cols, 0.3, random);
      constexpr int rows = 130;  // more than two blocks of rows
      const auto x = random.floats(static_cast<std::size_t>(rows * cols), -1, 1);
      std::vector<OutputRow> outputs;
      for (int row = 0; row < rows; ++row) {
        outputs.push_back({row, row, {.temperature = row % 3 == 0 ? 1.0f : 0.0f, .seed = 5}});
      }
      std::vector<RowStats> first;
      for (const int n_threads : {1, 2, 3}) {
        CpuBackend backend(n_threads);
        const auto weight = backend.load_weight(head.view());
        std::vector<RowStats> stats(rows);
        backend.head_stats({x.data()}, *weight, outputs, 7, stats);
        if (first.empty()) first = stats;
        for (const int row : {0, 1, 63, 64, 65, 129}) {
          CHECK(stats[row] == first[row]);
          RowStats alone;
          backend.head_stats({x.data()}, *weight, {&outputs[row], 1}, 7, {&alone, 1});
          CHECK(alone == first[row]);
        }
      }
    }
  }
}

TEST(head_stats_sample_without_changing_the_statistics) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    Random random(12);
    const Logits logits = {random.floats(700, -2, 2), random.floats(700, -2, 2)};
    const ChosenHead head(backend, logits);
    const TokenId mask = 600;
    const auto greedy = head.stats(backend, mask);
    for (std::uint64_t seed = 0; seed < 50; ++seed) {
      const Sampling sampling{.temperature = 0.8f, .top_k = 40, .top_p = 0.9f, .seed = seed};
      const auto stats = head.stats(backend, mask, sampling);
      for (int row = 0; row < 2; ++row) {
        std::vector<float> masked = logits[row];
        masked[mask] = kMinusInfinity;
        const Sample drawn = draw_one(*kernels, masked, sampling, 100 + row);
        CHECK_EQ(stats[row].sampled, drawn.token);
        CHECK_EQ(stats[row].sampled_probability, drawn.probability);
        CHECK_EQ(stats[row].argmax, greedy[row].argmax);
        CHECK_EQ(stats[row].entropy, greedy[row].entropy);  // untempered
        CHECK_EQ(stats[row].top_probability, greedy[row].top_probability);
      }
    }
  }
}

TEST(head_stats_refuse_logits_that_are_not_finite) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    for (const DType type : kDTypes) {
      Random random(13);
      const int cols = short_row(type);
      const auto stored = random_matrix("output.weight", type, 600, cols, 0.5, random);
      const auto weight = backend.load_weight(stored.view());
      const OutputRow outputs[] = {{0, 0, {}}, {1, 1, {.temperature = 1.0f}}};
      for (const float bad : {NAN, INFINITY, -INFINITY}) {
        for (const int at : {0, 20, 2 * cols - 1}) {
          auto x = random.floats(static_cast<std::size_t>(2 * cols), -1, 1);
          RowStats stats[2];
          backend.head_stats({x.data()}, *weight, outputs, 3, stats);
          x[at] = bad;
          CHECK_THROWS_WITH(backend.head_stats({x.data()}, *weight, outputs, 3, stats),
                            "the model computed logits that are NaN or infinite");
        }
      }
    }
    // Beyond float32, and too far down to tell from an excluded token.
    const ChosenHead head(backend, {{1.0f, 3e38f, 2.0f}});
    const OutputRow output{0, 0, {}};
    for (const float factor : {10.0f, -10.0f}) {
      RowStats stats;
      CHECK_THROWS_WITH(backend.head_stats({&factor}, *head.weight, {&output, 1}, -1, {&stats, 1}),
                        "NaN or infinite");
    }
    const ChosenHead lowest(backend, {{-2e30f, -3e30f}});
    CHECK_THROWS_WITH(lowest.stats(backend, -1), "NaN or infinite");
  }
}

}  // namespace
}  // namespace sbd::cpu
