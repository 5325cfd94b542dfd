// Random weights stand in for a model when timing one.
#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "core/random_weight.h"
#include "reference.h"

namespace sbd {
namespace {

using namespace test;

std::vector<float> values(Backend& backend, const Weight& weight) {
  std::vector<int> rows(static_cast<std::size_t>(weight.rows()));
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<float> out(rows.size() * static_cast<std::size_t>(weight.cols()));
  backend.begin({rows, rows, rows, {}}, {}, false);
  backend.embed(weight, nullptr, out.data());
  return out;
}

// What random_block() says, decoded by the tests' own reader of the formats.
std::vector<double> expected(DType dtype, int rows, int cols, std::uint64_t key) {
  StoredTensor tensor{"w", dtype, {rows, cols}, {}};
  const std::size_t bytes = bytes_per_block(dtype);
  const auto blocks = static_cast<std::size_t>(rows * cols / values_per_block(dtype));
  tensor.bytes.resize(blocks * bytes);
  for (std::size_t i = 0; i < blocks; ++i) {
    random_block(dtype, key, i, reinterpret_cast<std::uint8_t*>(tensor.bytes.data()) + i * bytes);
  }
  return values_of(tensor);
}

TEST(random_weights_of_every_type_are_small_and_repeatable) {
  constexpr int kRows = 40, kCols = 512;
  for (const DType dtype : kDTypes) {
    cpu::CpuBackend one(1), two(2);
    const auto weight = one.random_weight(dtype, kRows, kCols, 7);
    CHECK_EQ(weight->dtype(), dtype);
    const auto row = values(one, *weight);
    CHECK_EQ(values(two, *two.random_weight(dtype, kRows, kCols, 7)), row);
    CHECK(values(one, *one.random_weight(dtype, kRows, kCols, 8)) != row);
    const auto stored = expected(dtype, kRows, kCols, 7);
    double sum = 0, largest = 0, spread = 0;
    for (std::size_t i = 0; i < row.size(); ++i) {
      CHECK(std::abs(row[i] - stored[i]) <= 1e-6 * std::abs(stored[i]));
      sum += row[i];
      largest = std::max(largest, std::abs(static_cast<double>(row[i])));
      spread += std::abs(row[i]);
    }
    const auto n = static_cast<double>(row.size());
    CHECK(largest < 0.1 && spread / n > 0.002);
    CHECK(std::abs(sum / n) < 0.2 * spread / n);  // q4_0: half a step of four
  }
}

TEST(random_tensors_are_keyed_by_name) {
  cpu::CpuBackend backend(1);
  RandomTensors source(DType::bf16, /*tie_word_embeddings=*/false);
  CHECK(source.has("output.weight") && !source.has("rope_freqs.weight"));
  CHECK(!RandomTensors(DType::bf16, /*tie_word_embeddings=*/true).has("output.weight"));
  const auto matrix = [&](const char* name) {
    return values(backend, *source.matrix(name, 3, 64, backend));
  };
  CHECK_EQ(matrix("blk.0.attn_q.weight"), matrix("blk.0.attn_q.weight"));
  CHECK(matrix("blk.0.attn_q.weight") != matrix("blk.0.attn_k.weight"));
  const Tensor norm = source.get("output_norm.weight", {64});
  CHECK_EQ(norm.dtype, DType::f32);
  CHECK_EQ(norm.data.size(), 64 * sizeof(float));
  RandomTensors quantised(DType::q8_0, false);
  CHECK_THROWS_WITH(quantised.matrix("output.weight", 10, 33, backend),
                    "tensor output.weight: q8_0 needs rows of a multiple of 32 values, got 33");
}

}  // namespace
}  // namespace sbd
