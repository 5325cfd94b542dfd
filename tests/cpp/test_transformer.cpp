// The forward on tiny random models: against a plain float64 forward, and against itself, bit for
// bit, however its rows are cut into forwards.
#include "model/transformer.h"

#include <cmath>
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "reference.h"
#include "transformer_cases.h"

namespace sbd {
namespace {

using namespace test;

// 23 causal rows and a block of 9, in one forward.
TEST(transformer_agrees_with_float64) {
  const Tokens tokens = random_tokens(32, 1);
  std::vector<int> kv_end(32, 32);
  std::iota(kv_end.begin(), kv_end.begin() + 23, 1);
  for (const Variant& variant : kVariants) {
    for (const DType dtype : kDTypes) {
      ModelConfig config = tiny_config(variant.architecture, dtype);
      config.rope_linear_factor = variant.rope_linear_factor;
      MemoryTensors source(config, dtype, variant.tied, variant.rope_freqs, variant.more_biases);
      const Matrix expected = Float64Model(config, source).logits(tokens, kv_end);
      for (const cpu::Kernels* kernels : all_kernels()) {
        const ForcedIsa forced(kernels->name);
        cpu::CpuBackend backend(2);
        Transformer model(config, source, backend);
        for (const DType kv_dtype : {DType::f32, DType::f16, DType::bf16}) {
          KvCache kv = model.make_kv(40, kv_dtype);
          const auto logits = model.forward_logits(
              {{{&kv,
                 {{segment(slice(tokens, 0, 23)),
                   segment(slice(tokens, 23, 32), Attention::block, Kv::scratch)}}}}});
          CHECK_EQ(kv.length(), 23);
          // Float32 alone: 2e-6. Activations are rounded eleven times on the way: to bf16 by about
          // 2^-9 in the mean, to int8 by 1/500 of their group's largest; F16 keys by 2^-12. Layers
          // let these grow to 0.011, 0.026 and 0.0012. Where attention over F16 keys multiplies in
          // bf16, queries, keys, values and probabilities are rounded to it: 0.012. So they are in
          // a BF16 cache.
          double tolerance = kv_dtype == DType::f32 ? 1e-5 : kv_dtype == DType::f16 ? 3e-3 : 3e-2;
          if (kv_dtype == DType::f16 && kernels->short_interleave == 2) tolerance = 3e-2;
          if (dtype == DType::bf16) tolerance = 3e-2;
          if (values_per_block(dtype) > 1) tolerance = 6e-2;
          const double error = relative_error(logits, expected);
          CHECK_IN(std::string(kernels->name) + ", " + variant.architecture + ", weights " +
                       std::string(name(dtype)) + ", kv " + std::string(name(kv_dtype)) + ": " +
                       show(error),
                   error <= tolerance);
        }
      }
    }
  }
  CHECK(std::isnan(relative_error({1.0f, NAN, 2.0f}, {1, 1, 2})));
}

class ForwardPaths {
 public:
  ForwardPaths(const std::string& architecture, DType dtype, DType kv_dtype, int n_threads)
      : config_(tiny_config(architecture, dtype)),
        source_(config_, dtype, /*tied=*/false),
        backend_(n_threads),
        model_(config_, source_, backend_),
        kv_dtype_(kv_dtype) {}

  KvCache cache() const { return model_.make_kv(80, kv_dtype_); }
  std::vector<float> run(KvCache& kv, std::vector<Segment> segments) {
    return model_.forward_logits({{{&kv, {std::move(segments)}}}});
  }
  Transformer& model() { return model_; }

 private:
  ModelConfig config_;
  MemoryTensors source_;
  cpu::CpuBackend backend_;
  Transformer model_;
  DType kv_dtype_;
};

void append(std::vector<float>& all, const std::vector<float>& some) {
  all.insert(all.end(), some.begin(), some.end());
}

bool identical(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

TEST(transformer_rows_are_the_same_bits_however_they_are_computed) {
  const Tokens text = random_tokens(40, 2);
  const Tokens other = random_tokens(30, 3);
  const Tokens block = random_tokens(7, 4);
  const char* architectures[] = {"llama", "qwen2", "qwen3"};
  int round = 0;
  for (const cpu::Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    for (const DType dtype : kDTypes) {
      constexpr DType kCacheTypes[] = {DType::f16, DType::f32, DType::bf16};
      const DType kv_dtype = kCacheTypes[round / 3 % 3];
      const std::string architecture = architectures[round++ % 3];
      const std::string where = std::string(kernels->name) + ", " + std::string(name(dtype));
      std::vector<float> whole, blocked;  // logits of the text and of the block behind it
      for (const int n_threads : {1, 2, 3, 5}) {
        ForwardPaths paths(architecture, dtype, kv_dtype, n_threads);
        KvCache kv = paths.cache();
        const auto at_once = paths.run(kv, {segment(text)});
        const auto denoised = paths.run(kv, {segment(block, Attention::block, Kv::scratch)});
        if (whole.empty()) whole = at_once, blocked = denoised;
        CHECK_IN(where, identical(at_once, whole) && identical(denoised, blocked));
      }

      ForwardPaths paths(architecture, dtype, kv_dtype, 2);
      for (const int chunk : {1, 7, 16}) {
        KvCache kv = paths.cache();
        std::vector<float> chunks;
        for (int begin = 0; begin < 40; begin += chunk) {
          const int end = std::min(begin + chunk, 40);
          append(chunks, paths.run(kv, {segment(slice(text, begin, end))}));
        }
        CHECK_EQ(kv.length(), 40);
        CHECK_IN(where + ", chunks of " + std::to_string(chunk), identical(chunks, whole));
        CHECK(identical(paths.run(kv, {segment(block, Attention::block, Kv::scratch)}), blocked));
      }

      // Two commits and a block in one forward; scratch blocks in between leave no trace.
      KvCache kv = paths.cache();
      std::vector<float> fused;
      append(fused, paths.run(kv, {segment(slice(text, 0, 12))}));
      for (int i = 0; i < 3; ++i) {
        paths.run(kv, {segment(random_tokens(16 + i, 5), Attention::block, Kv::scratch)});
      }
      CHECK_EQ(kv.length(), 12);
      append(fused, paths.run(kv, {segment(slice(text, 12, 20)), segment(slice(text, 20, 40)),
                                   segment(block, Attention::block, Kv::scratch)}));
      std::vector<float> text_and_block = whole;
      append(text_and_block, blocked);
      CHECK_IN(where + ", fused", identical(fused, text_and_block));

      // Rolled back and forward again.
      const Batch again{{{&kv, {.segments = {segment(slice(text, 15, 40))}, .start = 15}}}};
      CHECK(identical(paths.model().forward_logits(again),
                      {whole.begin() + 15 * kVocab, whole.end()}));
      CHECK_EQ(kv.length(), 40);

      // In a batch with another sequence, before it and behind it.
      KvCache first = paths.cache(), second = paths.cache(), third = paths.cache();
      const auto batch = paths.model().forward_logits({{{&first, {{segment(other)}}},
                                                        {&second, {{segment(text)}}},
                                                        {&third, {{segment(other)}}}}});
      CHECK_IN(where + ", batch",
               identical({batch.begin() + 30 * kVocab, batch.begin() + 70 * kVocab}, whole));
      CHECK(identical({batch.begin(), batch.begin() + 30 * kVocab},
                      {batch.begin() + 70 * kVocab, batch.end()}));

      // Only some rows wanted.
      KvCache some_kv = paths.cache();
      Segment some = segment(text);
      some.outputs = {3, 20, 39};
      std::vector<float> rows;
      for (const int row : some.outputs) {
        rows.insert(rows.end(), whole.begin() + row * kVocab, whole.begin() + (row + 1) * kVocab);
      }
      CHECK_IN(where + ", some rows", identical(paths.run(some_kv, {some}), rows));
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

// Values beyond a half in an F16 cache: an error that says so, for every weight type.
TEST(transformer_overflow_of_the_cache_is_an_error) {
  for (const cpu::Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    for (const char* bias : {"blk.0.attn_v.bias", "blk.0.attn_k.bias"}) {
      for (const DType dtype : kDTypes) {
        const ModelConfig config = tiny_config("qwen2", dtype);
        MemoryTensors source(config, dtype, true);
        const float huge = 1e6f;
        std::memcpy(source.tensors.at(bias).bytes.data() + 4 * 5, &huge, sizeof huge);
        cpu::CpuBackend backend(1);
        Transformer model(config, source, backend);
        KvCache half = model.make_kv(10, DType::f16), single = model.make_kv(10, DType::f32);
        CHECK_THROWS_WITH(model.forward({{{&half, {{segment(random_tokens(8, 1))}}}}}),
                          "values exceed an F16 KV cache (then kv_dtype bf16 or f32 helps)");
        CHECK_EQ(model.forward({{{&single, {{segment(random_tokens(8, 1))}}}}}).size(), 8u);
      }
    }
  }
}

}  // namespace
}  // namespace sbd
