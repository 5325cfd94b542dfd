// The LM head on a GPU (head_cases.h), in tiles of every size; draws beside the CPU's.
#include "cuda_check.h"
#include "head_cases.h"

namespace sbd::cuda {
namespace {

using namespace test;

// A run of 128 is summed by 32 lanes of 4, exponentials are good to 2 units in the last place.
constexpr double kRelative = 17 * kEps;

TEST(cuda_head_statistics_of_every_vocabulary_and_mask) {
  CudaBackend backend(0);
  check_statistics_of_every_vocabulary_and_mask(backend, {1, 2, 17, 255, 4095, 4096, 4097, 9000},
                                                kRelative);
}

// Weights of every type in tiles of every size: one-hot rows make logits of their columns, exactly.
TEST(cuda_head_statistics_of_every_type_and_number_of_rows) {
  CudaBackend backend(0);
  Random random(14);
  const int vocab = many_features(65), mask = 200;
  for (const DType dtype : kTypes) {
    const int cols = whole_blocks(dtype, 64);
    const auto stored = random_matrix("output.weight", dtype, vocab, cols, 5.0, random);
    HeadInput head{backend.load_weight(stored.view()), nullptr, 0};
    const auto values = values_of(stored);
    Logits columns(static_cast<std::size_t>(cols));
    for (std::size_t i = 0; i < values.size(); ++i) {
      columns[i % columns.size()].push_back(static_cast<float>(values[i]));
    }
    for (const int rows : {1, 9, 20, 64, 65, 150, 300}) {
      // Beyond, passes repeat: for every type that would take longest of all tests.
      if (rows > 65 && dtype != DType::q8_0) continue;
      std::vector<float> one_hot(static_cast<std::size_t>(rows * cols));
      std::vector<OutputRow> outputs, drawn, asking;
      for (int row = 0; row < rows; ++row) {
        one_hot[static_cast<std::size_t>(row * cols + row * 7 % cols)] = 1;
        outputs.push_back({row, row, {}});
        drawn.push_back({row, row, {.temperature = 0.5f}});
        asking.push_back({row, row, {}, {}});
        if (row % 16 == 0) asking.back().ask = {.n_best = 1, .given = row * 11 % vocab};
      }
      head.x = backend.upload(one_hot);
      head.n_rows = rows;
      const auto stats = head.stats(backend, outputs, mask);
      const auto of_drawn = head.stats(backend, drawn, mask);  // whose logits are in memory
      const auto asked = head.stats(backend, asking, mask);
      for (int row = 0; row < rows; ++row) {
        const auto i = static_cast<std::size_t>(row);
        const auto& logits = columns[static_cast<std::size_t>(row * 7 % cols)];
        std::string wrong = wrong_greedy(stats[i], ruled(logits, mask), kRelative);
        if (wrong.empty()) wrong = wrong_scores(asked[i], asking[i].ask, logits);
        CHECK_IN(std::string(name(dtype)) + ", row " + std::to_string(row) + " of " +
                     std::to_string(rows) + ": " + wrong,
                 wrong.empty());
        CHECK(of_drawn[i].argmax == stats[i].argmax && of_drawn[i].entropy == stats[i].entropy &&
              of_drawn[i].margin == stats[i].margin && of_drawn[i].log_z == stats[i].log_z);
        CHECK(asked[i].argmax == stats[i].argmax && asked[i].entropy == stats[i].entropy);
      }
    }
  }
}

TEST(cuda_head_computes_rules_and_scores) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) check_rules_and_scores(backend, dtype, kRelative);
  check_scores_of_equals(backend);
  check_rules_at_their_ends(backend);
}

TEST(cuda_head_rows_depend_on_no_other_row) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) check_rows_alone(backend, dtype, 300);
}

TEST(cuda_draws_are_the_cpus) {
  CudaBackend backend(0);
  const Draws draws = check_draws_beside(*all_kernels().front(), backend, 2e-5);
  check_draws(__FILE__, __LINE__, draws.same, draws.all, 0.9);
}

TEST(cuda_head_refuses_logits_that_are_not_finite) {
  CudaBackend backend(0);
  check_refusal_of_logits_not_finite(backend);
}

}  // namespace
}  // namespace sbd::cuda
