// The forward on tiny random models, on every backend: against a plain float64 forward, and against
// itself, bit for bit, however its rows are cut into forwards.
#pragma once

#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/batch.h"
#include "device.h"
#include "model/transformer.h"
#include "tiny_transformer.h"

namespace sbd::test {

inline Tokens random_tokens(int n, std::uint64_t seed) {
  Random random(seed);
  Tokens tokens(static_cast<std::size_t>(n));
  for (TokenId& token : tokens) token = random.below(kVocab);
  return tokens;
}

// A segment whose rows are all wanted.
inline Segment segment(Tokens tokens, Attention attention = Attention::causal, Kv kv = Kv::commit) {
  Segment result{std::move(tokens), attention, kv, {}, {}};
  result.outputs.resize(result.tokens.size());
  std::iota(result.outputs.begin(), result.outputs.end(), 0);
  return result;
}

inline Tokens slice(const Tokens& tokens, int begin, int end) {
  return {tokens.begin() + begin, tokens.begin() + end};
}

// Root mean square of the differences over that of the expected values; NaN where any is NaN.
inline double relative_error(const std::vector<float>& actual, const Matrix& expected) {
  if (actual.size() != expected.size()) return NAN;
  double difference = 0;
  double size = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / size);
}

struct Variant {
  std::string architecture;
  bool tied;
  bool rope_freqs;
  bool more_biases;
  double rope_linear_factor;
};

inline const Variant kVariants[] = {{"llama", false, true, false, 1},
                                    {"llama", true, false, true, 2.5},
                                    {"qwen2", false, false, false, 1},
                                    {"qwen3", true, false, false, 1}};

// 23 causal rows and a block of 9, in one forward.
inline void check_agrees_with_float64(const std::vector<MakeDevice>& devices,
                                      std::span<const DType> dtypes) {
  const Tokens tokens = random_tokens(32, 1);
  std::vector<int> kv_end(32, 32);
  std::iota(kv_end.begin(), kv_end.begin() + 23, 1);
  for (const Variant& variant : kVariants) {
    for (const DType dtype : dtypes) {
      ModelConfig config = tiny_config(variant.architecture, dtype);
      config.rope_linear_factor = variant.rope_linear_factor;
      MemoryTensors source(config, dtype, variant.tied, variant.rope_freqs, variant.more_biases);
      const Matrix expected = Float64Model(config, source).logits(tokens, kv_end);
      for (const MakeDevice& make : devices) {
        const auto device = make();
        Transformer model(config, source, device->backend());
        for (const DType kv_dtype : kCacheTypes) {
          KvCache kv = model.make_kv(40, kv_dtype);
          const auto logits = model.forward_logits(
              {{{&kv,
                 {{segment(slice(tokens, 0, 23)),
                   segment(slice(tokens, 23, 32), Attention::block, Kv::scratch)}}}}});
          CHECK_EQ(kv.length(), 23);
          const double error = relative_error(logits, expected);
          CHECK_IN(device->name() + ", " + variant.architecture + ", weights " +
                       std::string(name(dtype)) + ", kv " + std::string(name(kv_dtype)) + ": " +
                       show(error),
                   error <= device->logits_error(dtype, kv_dtype));
        }
      }
    }
  }
  CHECK(std::isnan(relative_error({1.0f, NAN, 2.0f}, {1, 1, 2})));
}

inline bool identical(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

// A tiny model on a backend, and what is the same however it is computed.
class ForwardPaths {
 public:
  ForwardPaths(std::unique_ptr<Device> device, const std::string& architecture, DType dtype,
               DType kv_dtype)
      : where_(device->name() + ", " + std::string(name(dtype))),
        config_(tiny_config(architecture, dtype)),
        source_(config_, dtype, /*tied=*/false),
        device_(std::move(device)),
        model_(config_, source_, device_->backend()),
        kv_dtype_(kv_dtype) {
    KvCache kv = cache();
    whole_ = run(kv, {segment(text_)});
    blocked_ = run(kv, {scratch(block_)});
  }

  // Logits of a text and of a block behind it.
  const std::vector<float>& whole() const { return whole_; }
  const std::vector<float>& blocked() const { return blocked_; }

  void check_chunks() {
    for (const int chunk : {1, 7, 16}) {
      KvCache kv = cache();
      std::vector<float> chunks;
      for (int begin = 0; begin < 40; begin += chunk) {
        const int end = std::min(begin + chunk, 40);
        append(chunks, run(kv, {segment(slice(text_, begin, end))}));
      }
      CHECK_EQ(kv.length(), 40);
      CHECK_IN(where_ + ", chunks of " + std::to_string(chunk), identical(chunks, whole_));
      CHECK(identical(run(kv, {scratch(block_)}), blocked_));
    }
  }

  // Two commits and a block in one forward; scratch blocks in between leave no trace. Then rolled
  // back and forward again.
  void check_fused_and_rolled_back() {
    KvCache kv = cache();
    std::vector<float> fused;
    append(fused, run(kv, {segment(slice(text_, 0, 12))}));
    for (int i = 0; i < 3; ++i) run(kv, {scratch(random_tokens(16 + i, 5))});
    CHECK_EQ(kv.length(), 12);
    append(fused, run(kv, {segment(slice(text_, 12, 20)), segment(slice(text_, 20, 40)),
                           scratch(block_)}));
    std::vector<float> text_and_block = whole_;
    append(text_and_block, blocked_);
    CHECK_IN(where_ + ", fused", identical(fused, text_and_block));

    const Batch again{{{&kv, {.segments = {segment(slice(text_, 15, 40))}, .start = 15}}}};
    CHECK_IN(where_ + ", rolled back",
             identical(model_.forward_logits(again), {whole_.begin() + 15 * kVocab, whole_.end()}));
    CHECK_EQ(kv.length(), 40);
  }

  // In a batch with another sequence, before it and behind it.
  void check_batch() {
    const Tokens other = random_tokens(30, 3);
    KvCache first = cache(), second = cache(), third = cache();
    const auto batch = model_.forward_logits({{{&first, {{segment(other)}}},
                                               {&second, {{segment(text_)}}},
                                               {&third, {{segment(other)}}}}});
    CHECK_IN(where_ + ", batch",
             identical({batch.begin() + 30 * kVocab, batch.begin() + 70 * kVocab}, whole_));
    CHECK(identical({batch.begin(), batch.begin() + 30 * kVocab},
                    {batch.begin() + 70 * kVocab, batch.end()}));
  }

  void check_some_rows() {
    KvCache kv = cache();
    Segment some = segment(text_);
    some.outputs = {3, 20, 39};
    std::vector<float> rows;
    for (const int row : some.outputs) {
      rows.insert(rows.end(), whole_.begin() + row * kVocab, whole_.begin() + (row + 1) * kVocab);
    }
    CHECK_IN(where_ + ", some rows", identical(run(kv, {some}), rows));
  }

  const std::string& where() const { return where_; }
  Device& device() { return *device_; }

 private:
  KvCache cache() const { return model_.make_kv(80, kv_dtype_); }
  std::vector<float> run(KvCache& kv, std::vector<Segment> segments) {
    return model_.forward_logits({{{&kv, {std::move(segments)}}}});
  }
  static Segment scratch(Tokens tokens) {
    return segment(std::move(tokens), Attention::block, Kv::scratch);
  }
  static void append(std::vector<float>& all, const std::vector<float>& some) {
    all.insert(all.end(), some.begin(), some.end());
  }

  const Tokens text_ = random_tokens(40, 2), block_ = random_tokens(7, 4);
  std::string where_;
  ModelConfig config_;
  MemoryTensors source_;
  std::unique_ptr<Device> device_;
  Transformer model_;
  DType kv_dtype_;
  std::vector<float> whole_, blocked_;
};

// Values beyond a half in an F16 cache: an error that says so, for every weight type. The other
// caches hold them.
inline void check_overflow_of_the_cache(const std::vector<MakeDevice>& devices,
                                        std::span<const DType> dtypes) {
  for (const char* bias : {"blk.0.attn_v.bias", "blk.0.attn_k.bias"}) {
    for (const DType dtype : dtypes) {
      const ModelConfig config = tiny_config("qwen2", dtype);
      MemoryTensors source(config, dtype, true);
      const float huge = 1e6f;
      std::memcpy(source.tensors.at(bias).bytes.data() + 4 * 5, &huge, sizeof huge);
      for (const MakeDevice& make : devices) {
        const auto device = make();
        Transformer model(config, source, device->backend());
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
}

}  // namespace sbd::test
