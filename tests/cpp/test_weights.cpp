// A model file's tensors must be exactly those that its config asks for.
#include "model/weights.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "complete_model.h"

namespace sbd {
namespace {

using namespace test;

void load(const GgufBuilder& builder) {
  const MemoryFile image(builder.build());
  const GgufFile file(image.path());
  cpu::CpuBackend backend(1);
  FileTensors tensors(file);
  load_weights(read_model_config(file.metadata()), tensors, backend);
  tensors.check_all_used();
}

TEST(weights_of_complete_files_load) {
  for (const ModelShape& shape : complete_models()) load(complete_model(shape));
}

TEST(weights_every_tensor_is_needed) {
  for (const ModelShape& shape : complete_models()) {
    const GgufBuilder complete = complete_model(shape);
    for (std::size_t i = 0; i < complete.tensors.size(); ++i) {
      GgufBuilder builder = complete;
      const std::string name = builder.tensors[i].name;
      // What may be absent: the head is then the embedding, the frequencies are not divided.
      if (name == "output.weight" || name == "rope_freqs.weight") continue;
      builder.tensors.erase(builder.tensors.begin() + static_cast<std::ptrdiff_t>(i));
      CHECK_THROWS_WITH(load(builder),
                        "tensor " + name + " is missing: the file is not a complete model");
    }
  }
}

TEST(weights_of_a_wrong_shape_are_named) {
  const ModelShape shape = complete_models()[3];
  const GgufBuilder complete = complete_model(shape);
  for (std::size_t i = 0; i < complete.tensors.size(); ++i) {
    GgufBuilder builder = complete;
    GgufTensor& tensor = builder.tensors[i];
    const std::string row = std::to_string(tensor.dimensions[0]);
    const bool matrix = tensor.dimensions.size() == 2;
    const std::string rows = matrix ? std::to_string(tensor.dimensions[1]) : "";
    tensor =
        filled_tensor(tensor.name, {tensor.dimensions[0] + 1, matrix ? tensor.dimensions[1] : 1},
                      gguf_tensor::f32);
    const std::string longer = std::to_string(std::stoul(row) + 1);
    CHECK_THROWS_WITH(load(builder), "tensor " + tensor.name + ": expected shape [" +
                                         (matrix ? rows + ", " + row : row) +
                                         "] by the metadata, got [" +
                                         (matrix ? rows : std::string("1")) + ", " + longer + "]");
  }
}

TEST(weights_left_over_are_named) {
  GgufBuilder builder = complete_model(complete_models()[0]);
  builder.tensor(filled_tensor("blk.0.ffn_gate_inp.weight", {32, 4}, gguf_tensor::f32));
  CHECK_THROWS_WITH(load(builder),
                    "tensor 'blk.0.ffn_gate_inp.weight' belongs to an architecture this engine "
                    "does not compute");
}

TEST(weights_frequency_divisors_are_positive) {
  for (const float divisor : {0.0f, -2.0f}) {
    GgufBuilder builder = complete_model(complete_models()[0]);
    GgufTensor& divisors = builder.tensors.back();
    CHECK_EQ(divisors.name, std::string("rope_freqs.weight"));
    divisors.data.replace(4, 4, bytes_of(divisor));
    CHECK_THROWS_WITH(load(builder), "tensor rope_freqs.weight holds");
  }
}

TEST(weights_norms_are_f32) {
  GgufBuilder builder = complete_model(complete_models()[3]);
  for (GgufTensor& tensor : builder.tensors) {
    if (tensor.name == "output_norm.weight") {
      tensor = filled_tensor(tensor.name, tensor.dimensions, gguf_tensor::f16);
    }
  }
  CHECK_THROWS_WITH(load(builder), "tensor output_norm.weight: expected type f32, got f16");
}

// Random weights stand in for a model when timing one: finite, small, the same every time.
TEST(random_weights_of_every_type_are_small_and_repeatable) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::q8_0, DType::q4_0}) {
    cpu::CpuBackend backend(1);
    RandomTensors source(dtype, /*tie_word_embeddings=*/false);
    CHECK(source.has("output.weight") && !source.has("rope_freqs.weight"));
    CHECK(!RandomTensors(dtype, /*tie_word_embeddings=*/true).has("output.weight"));
    const Tensor first = source.get("blk.0.attn_q.weight", {48, 64});
    const std::vector<std::byte> bytes(first.data.begin(), first.data.end());
    backend.load_weight(first);  // finite
    const std::vector<TokenId> tokens = {0};
    const std::vector<int> positions = {0};
    std::vector<float> row(64);
    backend.begin({tokens, positions, positions, {}}, {}, false);
    backend.embed(*backend.load_weight(source.get("blk.0.attn_q.weight", {48, 64})), row.data());
    CHECK(std::ranges::all_of(row, [](float x) { return std::abs(x) < 0.1f; }));
    CHECK(std::ranges::any_of(row, [](float x) { return x != 0.0f; }));
    const Tensor again = source.get("blk.0.attn_q.weight", {48, 64});
    CHECK(std::ranges::equal(again.data, bytes));
    const Tensor other = source.get("blk.0.attn_k.weight", {48, 64});
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
