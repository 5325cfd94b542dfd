// Random weights stand in for a model when timing one.
#include "model/weights.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "reference.h"

namespace sbd {
namespace {

// Finite, small, the same every time.
TEST(random_weights_of_every_type_are_small_and_repeatable) {
  for (const DType dtype : kDTypes) {
    cpu::CpuBackend backend(1);
    RandomTensors source(dtype, /*tie_word_embeddings=*/false);
    CHECK(source.has("output.weight") && !source.has("rope_freqs.weight"));
    CHECK(!RandomTensors(dtype, /*tie_word_embeddings=*/true).has("output.weight"));
    const Tensor first = source.get("blk.0.attn_q.weight", {48, 256});
    const std::vector<std::byte> bytes(first.data.begin(), first.data.end());
    backend.load_weight(first);  // finite
    const std::vector<TokenId> tokens = {0};
    const std::vector<int> positions = {0};
    std::vector<float> row(256);
    backend.begin({tokens, positions, positions, {}}, {}, false);
    backend.embed(*backend.load_weight(source.get("blk.0.attn_q.weight", {48, 256})), row.data());
    CHECK(std::ranges::all_of(row, [](float x) { return std::abs(x) < 0.1f; }));
    CHECK(std::ranges::any_of(row, [](float x) { return x != 0.0f; }));
    const Tensor again = source.get("blk.0.attn_q.weight", {48, 256});
    CHECK(std::ranges::equal(again.data, bytes));
    const Tensor other = source.get("blk.0.attn_k.weight", {48, 256});
    CHECK(!std::ranges::equal(other.data, bytes));
    const Tensor norm = source.get("output_norm.weight", {64});
    CHECK_EQ(norm.dtype, DType::f32);
  }
  RandomTensors source(DType::q8_0, false);
  CHECK_THROWS_WITH(source.get("output.weight", {10, 33}),
                    "tensor output.weight: q8_0 needs rows of a multiple of 32 values, got 33");
}

}  // namespace
}  // namespace sbd
