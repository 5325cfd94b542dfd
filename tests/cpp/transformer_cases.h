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
#include "float64_model.h"
#include "model/transformer.h"
#include "random_adapter.h"
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
        for (const DType kv_dtype : device->cache_types(config.head_dim)) {
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

// Blocks behind a text, behind some of its tokens and behind none of them, in one forward: each as
// float64 has it alone, and the text's own rows the same bits as without them.
inline void check_branches(const std::vector<MakeDevice>& devices) {
  const Tokens text = random_tokens(23, 1), more = random_tokens(4, 7);
  for (const Variant& variant : kVariants) {
    ModelConfig config = tiny_config(variant.architecture, DType::f32);
    config.rope_linear_factor = variant.rope_linear_factor;
    MemoryTensors source(config, DType::f32, variant.tied, variant.rope_freqs, variant.more_biases);
    const auto block = [](int size) { return random_tokens(size, 20 + size); };
    Matrix expected;
    for (const auto& [begin, size] : {std::pair(27, 3), {26, 4}, {24, 3}, {23, 5}}) {
      Tokens tokens = text;
      tokens.insert(tokens.end(), more.begin(), more.end());
      tokens.resize(static_cast<std::size_t>(begin));
      const Tokens masks = block(size);
      tokens.insert(tokens.end(), masks.begin(), masks.end());
      std::vector<int> kv_end(tokens.size(), begin + size);
      std::iota(kv_end.begin(), kv_end.begin() + begin, 1);
      const Matrix logits = Float64Model(config, source).logits(tokens, kv_end);
      const auto first = static_cast<std::ptrdiff_t>(begin) * kVocab;
      expected.insert(expected.end(), logits.begin() + first, logits.end());
    }
    const auto branch = [&](int size, std::optional<int> begin) {
      Segment masks = segment(block(size), Attention::block, Kv::scratch);
      masks.begin = begin;
      return masks;
    };
    for (const MakeDevice& make : devices) {
      const auto device = make();
      Transformer model(config, source, device->backend());
      for (const DType kv_dtype : device->cache_types(config.head_dim)) {
        KvCache kv = model.make_kv(60, kv_dtype), plain = model.make_kv(60, kv_dtype);
        const auto run = [&](KvCache& cache, std::vector<Segment> segments) {
          return model.forward_logits({{{&cache, {std::move(segments)}}}});
        };
        run(kv, {segment(text)});
        run(plain, {segment(text)});
        const auto alone = run(plain, {segment(more)});
        const auto logits =
            run(kv, {segment(more), branch(3, {}), branch(4, 26), branch(3, 24), branch(5, 23)});
        CHECK_EQ(kv.length(), 27);
        const auto own = static_cast<std::ptrdiff_t>(alone.size());
        CHECK(identical({logits.begin(), logits.begin() + own}, alone));
        const double error = relative_error({logits.begin() + own, logits.end()}, expected);
        CHECK_IN(device->name() + ", " + variant.architecture + ", kv " +
                     std::string(name(kv_dtype)) + ": " + show(error),
                 error <= device->logits_error(DType::f32, kv_dtype));
        CHECK_THROWS_WITH(run(kv, {branch(3, 26), branch(3, {})}), "rows that go on from within");
        CHECK_THROWS_WITH(run(kv, {branch(3, 28)}), "rows that go on from within");
      }
    }
  }
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

// A text and a block of the adapter's masks behind a token: against float64, and the text's rows
// and what is cached of them the same bits as without an adapter, in a forward with others too.
inline void check_adapters(const std::vector<MakeDevice>& devices) {
  constexpr std::pair<DType, DType> kTypes[] = {{DType::f32, DType::f32},
                                                {DType::f32, DType::f16},
                                                {DType::q8_0, DType::f16},
                                                {DType::bf16, DType::bf16},
                                                {DType::q8_0, DType::q8_0}};
  const Tokens text = random_tokens(23, 1);
  Tokens block(9, kMaskSlot);
  block[0] = 5;
  Tokens all = text;
  all.insert(all.end(), block.begin(), block.end());
  std::vector<int> kv_end(32, 32);
  std::iota(kv_end.begin(), kv_end.begin() + 23, 1);
  std::vector<bool> rows(32, false);
  std::fill(rows.begin() + 23, rows.end(), true);
  Segment masks = segment(block, Attention::block, Kv::scratch);
  masks.adapted = true;
  int round = 0;
  for (const auto& [dtype, adapter_dtype] : kTypes) {
    const std::string architecture = kVariants[round++ % 4].architecture;
    const ModelConfig config = tiny_config(architecture, dtype);
    MemoryTensors source(config, dtype, true);
    const RandomAdapter adapter(config, adapter_dtype);
    const MemoryFile file(adapter.builder().build());
    const Float64Adapter exact{adapter.tensors, RandomAdapter::kAlpha, rows};
    const Matrix expected = Float64Model(config, source).logits(all, kv_end, {}, &exact);
    for (const MakeDevice& make : devices) {
      const auto device = make();
      const auto run = [&](Transformer& model, KvCache& kv, std::vector<Segment> segments) {
        return model.forward_logits({{{&kv, {std::move(segments)}}}});
      };
      Transformer plain(config, source, device->backend());
      Transformer model(config, source, device->backend());
      model.set_adapter(GgufFile(file.path()));
      KvCache frozen = plain.make_kv(40, DType::f32), kv = model.make_kv(40, DType::f32);
      const auto whole = run(plain, frozen, {segment(text)});
      const auto logits = run(model, kv, {segment(text), masks});
      const std::string where = device->name() + ", " + architecture + ", weights " +
                                std::string(name(dtype)) + ", adapter " +
                                std::string(name(adapter_dtype));
      const double error = relative_error(logits, expected);
      CHECK_IN(where + ": " + show(error),
               error <= std::max(device->logits_error(dtype, DType::f32),
                                 device->logits_error(adapter_dtype, DType::f32)));
      CHECK_IN(where, identical({logits.begin(), logits.begin() + 23 * kVocab}, whole));
      const std::vector<float> drafted(logits.begin() + 23 * kVocab, logits.end());
      CHECK_EQ(kv.length(), 23);
      CHECK_IN(where, identical(run(model, kv, {masks}), drafted));
      CHECK_IN(where,
               identical(run(model, kv, {segment({7})}), run(plain, frozen, {segment({7})})));

      KvCache first = model.make_kv(40, DType::f32), second = model.make_kv(40, DType::f32);
      const auto batch = model.forward_logits(
          {{{&first, {{segment(text), masks}}}, {&second, {{segment(text), masks}}}}});
      std::vector<float> twice = logits;
      twice.insert(twice.end(), logits.begin(), logits.end());
      CHECK_IN(where + ", batch", identical(batch, twice));

      Segment kept = masks;
      kept.kv = Kv::commit;
      CHECK_THROWS_WITH(run(model, kv, {kept}), "is kept in the cache and asks for an adapter");
      CHECK_THROWS_WITH(run(model, kv, {segment({kMaskSlot})}), "token id -1 is outside");
      CHECK_THROWS_WITH(run(plain, frozen, {masks}), "asks for an adapter, and none is loaded");
    }
  }
}

// With a mask token in the vocabulary the adapter's mask stands in for it, in its rows alone.
inline void check_masks_of_adapters(const std::vector<MakeDevice>& devices) {
  ModelConfig config = tiny_config("qwen3");
  MemoryTensors source(config, DType::f32, true);
  const MemoryFile file(RandomAdapter(config, DType::f32).builder().build());
  for (const MakeDevice& make : devices) {
    const auto device = make();
    const auto logits = [&](std::optional<TokenId> mask_token, const Segment& block) {
      config.mask_token_id = mask_token;
      Transformer model(config, source, device->backend());
      model.set_adapter(GgufFile(file.path()));
      KvCache kv = model.make_kv(16, DType::f32);
      return model.forward_logits({{{&kv, {{block}}}}});
    };
    Segment slots = segment({3, kMaskSlot, kMaskSlot}, Attention::block, Kv::scratch);
    Segment tokens = segment({3, 9, 9}, Attention::block, Kv::scratch);
    CHECK(identical(logits(9, tokens), logits({}, tokens)));
    slots.adapted = tokens.adapted = true;
    CHECK(identical(logits(9, tokens), logits({}, slots)));
    CHECK(!identical(logits({}, tokens), logits({}, slots)));
  }
}

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
        CHECK_THROWS_WITH(
            model.forward({{{&half, {{segment(random_tokens(8, 1))}}}}}),
            "values exceed an F16 or Q8_0 KV cache (then kv_dtype bf16 or f32 helps)");
        for (const DType wide : {DType::f32, DType::bf16}) {
          KvCache kv = model.make_kv(10, wide);
          CHECK_EQ(model.forward({{{&kv, {{segment(random_tokens(8, 1))}}}}}).size(), 8u);
        }
      }
    }
  }
}

}  // namespace sbd::test
