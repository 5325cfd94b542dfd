// The forward on the cases of every backend, its statistics, and what it refuses.
#include "model/transformer.h"

#include <cmath>

#include "cpu_device.h"
#include "decode/lossless.h"
#include "decode/ntp.h"
#include "transformer_cases.h"

namespace sbd {
namespace {

using namespace test;

TEST_ON_EVERY_ISA(transformer_rows_go_on_from_within_others) { check_branches(cpu_devices()); }

struct Decoded {
  Tokens text;
  int partly = 0;  // drafts of which some guesses were kept, and not all
  int forwards = 0;
};

Decoded decoded(Decoder& decoder, KvCache kv, Transformer& model) {
  Decoded done;
  for (;;) {
    const Plan plan = decoder.plan({});
    const std::vector<RowStats> stats = model.forward({{{&kv, plan}}});
    const Events events = decoder.absorb(plan, stats);
    ++done.forwards;
    done.text.insert(done.text.end(), events.committed.begin(), events.committed.end());
    const int kept = events.accepted.value_or(1) - 1;
    done.partly += kept > 0 && kept < events.guesses ? 1 : 0;
    if (events.finished) return done;
  }
}

TEST(transformer_lossless_text_of_drafts_behind_every_outcome) {
  ModelConfig config = tiny_config("llama");
  config.mask_token_id = 9;
  MemoryTensors source(config, DType::f32, true);
  cpu::CpuBackend backend(2);
  Transformer model(config, source, backend);
  int partly = 0;
  for (int round = 0; round < 20; ++round) {
    DecodeTask task;
    task.prompt = random_tokens(5 + round, 30 + round);
    task.max_tokens = 40;
    task.n_ctx = 128;
    // Noise that decides nearly alone, and is the same for a mask and the row before it.
    task.sampling.temperature = 2.0f + static_cast<float>(round);
    task.sampling.seed = static_cast<std::uint64_t>(round);
    NtpDecoder ntp(task);
    LosslessDecoder lossless(task, {.mask_token_id = 9,
                                    .block_size = 2 + round % 4,
                                    .unmask = {.gamma = 1e9f},
                                    .begins = Begins::every});
    const Decoded expected = decoded(ntp, model.make_kv(128, DType::f32), model);
    const Decoded done = decoded(lossless, model.make_kv(128, DType::f32), model);
    CHECK_EQ(done.text, expected.text);
    CHECK(done.forwards < expected.forwards);
    partly += done.partly;
  }
  CHECK(partly > 20);
}

TEST_ON_EVERY_ISA(transformer_agrees_with_float64) {
  check_agrees_with_float64(cpu_devices(), kDTypes);
}

TEST_ON_EVERY_ISA(transformer_adapters_change_the_rows_that_ask) {
  check_adapters(cpu_devices());
  check_masks_of_adapters(cpu_devices());
}

TEST_ON_EVERY_ISA(transformer_rows_are_the_same_bits_however_they_are_computed) {
  const char* architectures[] = {"llama", "qwen2", "qwen3"};
  int round = 0;
  for (const cpu::Kernels* kernels : tested_kernels()) {
    for (const DType dtype : kDTypes) {
      constexpr DType kKvTypes[] = {DType::f16, DType::f32, DType::bf16};
      const bool groups = tiny_config("llama", dtype).head_dim % kGroupSize == 0 && round % 2 == 0;
      const DType kv_dtype = groups ? DType::q8_0 : kKvTypes[round / 3 % 3];
      const std::string architecture = architectures[round++ % 3];
      const auto paths_on = [&](int n_threads) {
        return ForwardPaths(std::make_unique<CpuDevice>(kernels, n_threads), architecture, dtype,
                            kv_dtype);
      };
      ForwardPaths paths = paths_on(2);
      for (const int n_threads : {1, 3, 5}) {
        const ForwardPaths others = paths_on(n_threads);
        CHECK_IN(paths.where(), identical(others.whole(), paths.whole()) &&
                                    identical(others.blocked(), paths.blocked()));
      }
      paths.check_chunks();
      paths.check_fused_and_rolled_back();
      paths.check_batch();
      paths.check_some_rows();
    }
  }
}

TEST(transformer_statistics_are_those_of_its_logits) {
  ModelConfig config = tiny_config("qwen3");
  config.mask_token_id = 9;
  MemoryTensors source(config, DType::f32, true);
  cpu::CpuBackend backend(2);
  Transformer model(config, source, backend);
  const Tokens text = random_tokens(20, 6);
  KvCache a = model.make_kv(32, DType::f16), b = model.make_kv(32, DType::f16);
  const auto logits = model.forward_logits({{{&a, {{segment(text)}}}}});
  const auto stats = model.forward({{{&b, {{segment(text)}}}}});
  CHECK_EQ(stats.size(), 20u);
  for (std::size_t row = 0; row < stats.size(); ++row) {
    const float* l = logits.data() + row * kVocab;
    TokenId argmax = 0;
    double sum = 0;
    for (TokenId id = 0; id < kVocab; ++id) {
      if (id == 9) continue;
      if (l[id] > l[argmax]) argmax = id;
      sum += std::exp(static_cast<double>(l[id]));
    }
    CHECK_EQ(stats[row].argmax, argmax);
    CHECK_NEAR(stats[row].log_z, std::log(sum), 1e-5);
    CHECK_NEAR(stats[row].top_probability, std::exp(l[argmax]) / sum, 1e-6);
  }
  // A forward that wants nothing only fills the cache.
  Segment prompt = segment(text);
  prompt.outputs.clear();
  KvCache c = model.make_kv(32, DType::f16);
  CHECK(model.forward({{{&c, {{prompt}}}}}).empty());
  CHECK_EQ(c.length(), 20);
}

TEST(transformer_refuses_what_it_cannot_compute) {
  const ModelConfig config = tiny_config("llama");
  MemoryTensors source(config, DType::f32, true);
  cpu::CpuBackend backend(1);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(10, DType::f16);
  const auto run = [&](std::vector<Segment> segments) {
    return model.forward({{{&kv, {std::move(segments)}}}});
  };
  run({segment(random_tokens(6, 1))});
  CHECK_THROWS_WITH(run({segment(random_tokens(5, 1))}),
                    "the KV cache holds 10 positions, but 11 are needed");
  CHECK_THROWS_WITH(
      run({segment({1}), segment(random_tokens(4, 1), Attention::block, Kv::scratch)}),
      "the KV cache holds 10 positions, but 11 are needed");
  CHECK_THROWS_WITH(run({segment({1, kVocab})}), "token id 75 is outside the vocabulary of 75");
  CHECK_THROWS_WITH(run({segment({-1})}), "token id -1 is outside the vocabulary of 75");
  CHECK_THROWS_WITH(run({segment({1}, Attention::block, Kv::scratch), segment({2})}),
                    "a committed segment cannot follow a scratch one");
  CHECK_EQ(kv.length(), 6);  // a refused forward leaves the cache as it was
  CHECK_EQ(run({segment(random_tokens(4, 1))}).size(), 4u);  // and the last position is usable
  CHECK_EQ(kv.length(), 10);
}

TEST(transformer_weights_that_are_not_finite_are_named) {
  const ModelConfig config = tiny_config("qwen2");
  for (const char* name : {"token_embd.weight", "blk.1.attn_norm.weight", "blk.0.attn_k.bias",
                           "blk.1.ffn_down.weight", "output_norm.weight"}) {
    MemoryTensors source(config, DType::f32, true);
    const float nan = NAN;
    std::memcpy(
        source.tensors.at(name).bytes.data() + 4 * 33 % source.tensors.at(name).bytes.size(), &nan,
        sizeof nan);
    cpu::CpuBackend backend(1);
    CHECK_THROWS_WITH(Transformer(config, source, backend), std::string("tensor ") + name);
    CHECK_THROWS_WITH(Transformer(config, source, backend), "NaN or infinity");
  }
}

TEST_ON_EVERY_ISA(transformer_overflow_of_the_cache_is_an_error) {
  check_overflow_of_the_cache(cpu_devices(1), kDTypes);
}

}  // namespace
}  // namespace sbd
