// The forward on tiny random models: against a plain float64 forward, and against itself, bit for
// bit, however its rows are cut into forwards; launched kernel by kernel, or as a graph.
#include <cmath>
#include <numeric>

#include "cuda_check.h"
#include "decode/dmtd.h"
#include "model/transformer.h"
#include "transformer_cases.h"

namespace sbd::cuda {
namespace {

using namespace test;

// 23 causal rows and a block of 9, in one forward.
TEST(cuda_transformer_agrees_with_float64) {
  const Tokens tokens = random_tokens(32, 1);
  std::vector<int> kv_end(32, 32);
  std::iota(kv_end.begin(), kv_end.begin() + 23, 1);
  for (const Variant& variant : kVariants) {
    for (const DType dtype : kTypes) {
      ModelConfig config = tiny_config(variant.architecture, dtype);
      config.rope_linear_factor = variant.rope_linear_factor;
      MemoryTensors source(config, dtype, variant.tied, variant.rope_freqs, variant.more_biases);
      const Matrix expected = Float64Model(config, source).logits(tokens, kv_end);
      CudaBackend backend(0);
      Transformer model(config, source, backend);
      for (const DType kv_dtype : kCacheTypes) {
        KvCache kv = model.make_kv(40, kv_dtype);
        const auto logits = model.forward_logits(
            {{{&kv,
               {{segment(slice(tokens, 0, 23)),
                 segment(slice(tokens, 23, 32), Attention::block, Kv::scratch)}}}}});
        CHECK_EQ(kv.length(), 23);
        // Float32 alone: 2e-6. Halves round activations, or queries, keys, values and
        // probabilities, by 2^-12 in the mean; bf16 by 2^-9; layers let these grow some tenfold.
        double tolerance = kv_dtype == DType::f32 ? 1e-5 : 3e-3;
        if (dtype != DType::f32) tolerance = 5e-3;
        if (dtype == DType::bf16 || kv_dtype == DType::bf16) tolerance = 2e-2;
        const double error = relative_error(logits, expected);
        CHECK_IN(variant.architecture + ", weights " + std::string(name(dtype)) + ", kv " +
                     std::string(name(kv_dtype)) + ": " + show(error),
                 error <= tolerance);
      }
    }
  }
}

bool identical(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

TEST(cuda_transformer_rows_are_the_same_bits_however_they_are_computed) {
  const Tokens text = random_tokens(40, 2), other = random_tokens(30, 3),
               block = random_tokens(7, 4);
  const char* architectures[] = {"llama", "qwen2", "qwen3"};
  int round = 0;
  for (const DType dtype : kTypes) {
    const DType kv_dtype = kCacheTypes[round / 2];
    const ModelConfig config = tiny_config(architectures[round++ % 3], dtype);
    MemoryTensors source(config, dtype, /*tied=*/false);
    CudaBackend backend(0);
    Transformer model(config, source, backend);
    const std::string where(name(dtype));
    const auto run = [&](KvCache& kv, std::vector<Segment> segments) {
      return model.forward_logits({{{&kv, {std::move(segments)}}}});
    };
    KvCache kv = model.make_kv(80, kv_dtype);
    const auto whole = run(kv, {segment(text)});
    const auto blocked = run(kv, {segment(block, Attention::block, Kv::scratch)});
    for (const int chunk : {1, 7, 16}) {
      KvCache again = model.make_kv(80, kv_dtype);
      std::vector<float> chunks;
      for (int begin = 0; begin < 40; begin += chunk) {
        const auto part = run(again, {segment(slice(text, begin, std::min(begin + chunk, 40)))});
        chunks.insert(chunks.end(), part.begin(), part.end());
      }
      CHECK_IN(where + ", chunks of " + std::to_string(chunk), identical(chunks, whole));
      CHECK(identical(run(again, {segment(block, Attention::block, Kv::scratch)}), blocked));
    }
    CHECK(backend.n_graph_replays() > 0);  // one row at a time, 38 times

    // In a batch with another sequence, before it and behind it.
    KvCache first = model.make_kv(80, kv_dtype), second = model.make_kv(80, kv_dtype),
            third = model.make_kv(80, kv_dtype);
    const auto batch = model.forward_logits({{{&first, {{segment(other)}}},
                                              {&second, {{segment(text)}}},
                                              {&third, {{segment(other)}}}}});
    CHECK_IN(where + ", batch",
             identical({batch.begin() + 30 * kVocab, batch.begin() + 70 * kVocab}, whole));
    CHECK(identical({batch.begin(), batch.begin() + 30 * kVocab},
                    {batch.begin() + 70 * kVocab, batch.end()}));
  }
}

// A block's forwards want fewer and fewer rows.
TEST(cuda_transformer_graph_serves_any_wanted_rows) {
  const ModelConfig config = tiny_config("llama");
  MemoryTensors source(config, DType::bf16, true);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(32, DType::f16);
  Segment block = segment(random_tokens(12, 8), Attention::block, Kv::scratch);
  model.forward({{{&kv, {{block}}}}});  // in parts, while memory grows
  const auto all = model.forward({{{&kv, {{block}}}}});
  CHECK_EQ(backend.n_graph_replays(), 0);
  int replays = 0;
  for (const std::vector<int>& wanted : {std::vector<int>{0, 5, 11}, {7}, {2, 3}}) {
    block.outputs = wanted;
    const auto some = model.forward({{{&kv, {{block}}}}});
    CHECK_EQ(backend.n_graph_replays(), ++replays);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      CHECK_EQ(some[i].log_z, all[static_cast<std::size_t>(wanted[i])].log_z);
    }
  }
}

// A prompt whose rows nobody wants leaves its kernels on the tape: they run before what follows.
TEST(cuda_transformer_fills_the_cache_without_outputs) {
  const ModelConfig config = tiny_config("qwen3");
  MemoryTensors source(config, DType::f32, true);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  const Tokens text = random_tokens(20, 6);
  KvCache a = model.make_kv(32, DType::f16);
  const auto whole = model.forward_logits({{{&a, {{segment(text)}}}}});
  {
    KvCache dropped = model.make_kv(32, DType::f16);  // freed with its kernels not yet run
    model.forward({{{&dropped, {{{.tokens = text}}}}}});
  }
  KvCache b = model.make_kv(32, DType::f16);
  CHECK(model.forward({{{&b, {{{.tokens = slice(text, 0, 19)}}}}}}).empty());
  const auto last = model.forward_logits({{{&b, {{segment(slice(text, 19, 20))}}}}});
  CHECK(identical(last, {whole.end() - kVocab, whole.end()}));
}

TEST(cuda_layers_in_sections_agree_with_float64) {
  ModelConfig config = tiny_config("qwen2");
  config.layer_sections = {1, 1, 1};
  config.num_hidden_layers = 3;
  MemoryTensors source(config, DType::f32, /*tied=*/false);
  const Float64Model reference(config, source);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  const Tokens tokens = random_tokens(9, 5);
  std::vector<Coefficients> factors;
  Plan plan;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    factors.push_back({1, i % 3 == 0 ? 1.0 : 0.0});
    plan.segments.push_back({.tokens = {tokens[i]},
                             .outputs = {0},
                             .e_factor = 1,
                             .h_factor = static_cast<float>(factors.back().b)});
  }
  KvCache kv = model.make_kv(40, DType::f32);
  std::vector<int> kv_end(tokens.size());
  std::iota(kv_end.begin(), kv_end.end(), 1);
  const double error = relative_error(model.forward_logits({{{&kv, plan}}}),
                                      reference.logits(tokens, kv_end, factors));
  CHECK_IN(show(error), error <= 1e-5);
}

// Values beyond a half in an F16 cache: an error that says so, for every weight type. The other
// caches hold them.
TEST(cuda_transformer_overflow_of_the_cache_is_an_error) {
  for (const char* bias : {"blk.0.attn_v.bias", "blk.0.attn_k.bias"}) {
    for (const DType dtype : kTypes) {
      const ModelConfig config = tiny_config("qwen2", dtype);
      MemoryTensors source(config, dtype, true);
      const float huge = 1e6f;
      std::memcpy(source.tensors.at(bias).bytes.data() + 4 * 5, &huge, sizeof huge);
      CudaBackend backend(0);
      Transformer model(config, source, backend);
      KvCache half = model.make_kv(10, DType::f16);
      CHECK_THROWS_WITH(model.forward({{{&half, {{segment(random_tokens(8, 1))}}}}}),
                        "values exceed an F16 KV cache (then kv_dtype bf16 or f32 helps)");
      for (const DType wide : {DType::f32, DType::bf16}) {
        KvCache kv = model.make_kv(10, wide);
        CHECK_EQ(model.forward({{{&kv, {{segment(random_tokens(8, 1))}}}}}).size(), 8u);
      }
    }
  }
}

}  // namespace
}  // namespace sbd::cuda
