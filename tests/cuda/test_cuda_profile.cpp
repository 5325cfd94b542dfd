// A forward's kernels by name: how often each runs, and what it reads.
#include <map>

#include "cuda_check.h"
#include "model/transformer.h"
#include "transformer_cases.h"

namespace sbd::cuda {
namespace {

using namespace test;

std::map<std::string, KernelTime> by_name(const ForwardProfile& profile) {
  std::map<std::string, KernelTime> kernels;
  for (const KernelTime& kernel : profile.kernels) {
    CHECK(kernel.us > 0);
    kernels[kernel.name] = kernel;
  }
  return kernels;
}

TEST(cuda_profile_counts_a_forwards_kernels_and_bytes) {
  ModelConfig config = tiny_config("qwen3", DType::bf16);
  MemoryTensors source(config, DType::bf16, /*tied=*/false);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(40, DType::f16);
  model.forward({{{&kv, {{{.tokens = random_tokens(20, 1)}}}}}});
  Segment block = segment(random_tokens(8, 2), Attention::block, Kv::scratch);
  block.outputs = {3};
  const Batch batch{{{&kv, {{block}}}}};
  const auto before = model.forward(batch);
  const ForwardProfile profile = backend.profile([&] { model.forward(batch); });
  auto kernels = by_name(profile);
  // Hidden 64, four heads and two key-value heads of 16, intermediate 96, two layers. A stage of
  // weights is 128 outputs by 64 inputs.
  constexpr double kStage = 128 * 64 * 2;
  const auto check_kernel = [&](const char* name, int calls, double bytes) {
    CHECK_IN(std::string(name), kernels.contains(name));
    CHECK_EQ(kernels[name].calls, calls);
    CHECK_EQ(kernels[name].bytes, bytes);
  };
  check_kernel("bf16 64 -> 128", 2, 2 * 3 * kStage);  // q, k and v: a block of outputs each
  check_kernel("bf16 64 -> 64", 2, 2 * kStage);
  check_kernel("bf16 64 -> 192", 2, 2 * 2 * kStage);
  check_kernel("bf16 96 -> 64", 2, 2 * 2 * kStage);
  check_kernel("bf16 64 -> 75", 1, kStage);                 // the head
  check_kernel("attention", 2, 2.0 * 28 * 2 * 2 * 16 * 2);  // of keys and values, in halves
  check_kernel("attention merge", 2, 0);
  check_kernel("rotate and cache", 2, 0);
  check_kernel("norm", 5, 0);
  check_kernel("swiglu", 2, 0);
  check_kernel("head statistics", 1, 0);
  check_kernel("embed", 1, 0);
  const std::size_t n_kinds = kernels.size();
  CHECK(profile.graph_us > 0 && profile.in_turn_us > 0 && profile.matmuls_us > 0);
  CHECK(profile.matmuls_us < profile.in_turn_us);

  // What is asked of a row beyond statistics: rules alone take no kernel more, scores one, and a
  // given token's rank the head's product once more.
  block.asks = {{.rules = std::make_shared<LogitRules>(LogitRules{.adjustments = {{.token = 5}}})}};
  const auto profile_of_block = [&] {
    return by_name(backend.profile([&] { model.forward({{{&kv, {{block}}}}}); }));
  };
  kernels = profile_of_block();
  CHECK_EQ(kernels.size(), n_kinds);
  check_kernel("bf16 64 -> 75", 1, kStage);
  block.asks[0].n_best = 3;
  block.asks[0].given = 5;
  kernels = profile_of_block();
  CHECK_EQ(kernels.size(), n_kinds + 1);
  check_kernel("scores", 1, 0);
  check_kernel("bf16 64 -> 75", 2, 2 * kStage);

  const auto behind = model.forward(batch);  // which finds everything as it was
  CHECK_EQ(behind[0].log_z, before[0].log_z);
  CHECK_EQ(kv.length(), 20);
}

}  // namespace
}  // namespace sbd::cuda
