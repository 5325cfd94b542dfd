// The LM head on the CPU, for every kernel table (head_cases.h).
#include "check.h"
#include "cpu_device.h"
#include "head_cases.h"
#include "reference.h"

namespace sbd::cpu {
namespace {

using namespace test;

// A run of 512 is summed in 16 lanes of 32 and added up in float64.
constexpr double kRelative = 2e-7 + 44 * kEps;

template <typename Check>
void on_every_table(Check check) {
  for (const Kernels* kernels : tested_kernels()) {
    CpuDevice device(kernels);
    check(device.backend(), *kernels);
  }
}

TEST_ON_EVERY_ISA(head_statistics_of_every_vocabulary_and_mask) {
  on_every_table([](Backend& backend, const Kernels&) {
    check_statistics_of_every_vocabulary_and_mask(backend, {1, 2, 15, 16, 17, 511, 512, 513, 2000},
                                                  kRelative);
  });
}

TEST(head_statistics_check_finds_wrong_ones) {
  const std::vector<float> logits = {0.5f, 2.0f, -1.0f};
  CpuBackend backend(1);
  const RowStats right = chosen_head(backend, {logits}).stats(backend, -1)[0];
  CHECK_EQ(wrong_greedy(right, ruled(logits, -1), kRelative), std::string());
  for (const auto field : {&RowStats::top_probability, &RowStats::margin, &RowStats::log_z,
                           &RowStats::entropy, &RowStats::sampled_probability}) {
    for (const float value : {0.0f, NAN, -(right.*field), right.*field * 1.0001f}) {
      RowStats wrong = right;
      wrong.*field = value;
      CHECK(!wrong_greedy(wrong, ruled(logits, -1), kRelative).empty());
    }
  }
  CHECK(!wrong_greedy(right, ruled(logits, 1), kRelative).empty());
}

TEST(head_scores_check_finds_wrong_ones) {
  const std::vector<float> logits = {0.5f, 2.0f, 2.0f, -1.0f};
  CpuBackend backend(1);
  const RowAsk ask{.n_best = 2, .given = 2};
  OutputRow output{0, 0, {}, ask};
  const RowStats right = chosen_head(backend, {logits}).stats(backend, {output}, 3)[0];
  CHECK_EQ(wrong_scores(right, ask, logits), std::string());
  CHECK_EQ(right.scores->rank, 1);
  const auto is_wrong = [&](auto change) {
    RowScores scores = *right.scores;
    change(scores);
    RowStats wrong = right;
    wrong.scores = std::make_shared<RowScores>(scores);
    CHECK(!wrong_scores(wrong, ask, logits).empty());
  };
  is_wrong([](RowScores& scores) { scores.token.token = 1; });
  is_wrong([](RowScores& scores) { scores.token.logprob *= 1.0001f; });
  is_wrong([](RowScores& scores) { scores.rank = 0; });
  is_wrong([](RowScores& scores) { scores.best.pop_back(); });
  is_wrong([](RowScores& scores) { std::swap(scores.best[0], scores.best[1]); });
  is_wrong([](RowScores& scores) { scores.best[1].logprob = NAN; });
  CHECK(!wrong_scores(right, {}, logits).empty());
}

TEST_ON_EVERY_ISA(head_computes_rules_and_scores) {
  on_every_table([](Backend& backend, const Kernels&) {
    for (const DType type : kDTypes) check_rules_and_scores(backend, type, kRelative);
    check_scores_of_equals(backend);
    check_rules_at_their_ends(backend);
  });
}

TEST_ON_EVERY_ISA(head_statistics_depend_on_no_thread_count_and_no_other_row) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const DType type : kDTypes) {
      std::vector<RowStats> first;
      for (const int n_threads : {1, 2, 3}) {
        CpuDevice device(kernels, n_threads);
        const auto stats = check_rows_alone(device.backend(), type, 1200);
        if (first.empty()) first = stats;
        CHECK(std::ranges::equal(stats, first, same));
      }
    }
  }
}

TEST_ON_EVERY_ISA(head_draws_are_the_samplers) {
  on_every_table([](Backend& backend, const Kernels& kernels) {
    const Draws draws = check_draws_beside(kernels, backend, 0);
    CHECK_EQ(draws.same, draws.all);
  });
}

TEST_ON_EVERY_ISA(head_refuses_logits_that_are_not_finite) {
  on_every_table(
      [](Backend& backend, const Kernels&) { check_refusal_of_logits_not_finite(backend); });
}

}  // namespace
}  // namespace sbd::cpu
