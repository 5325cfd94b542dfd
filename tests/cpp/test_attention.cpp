// Attention of every kernel table, through the backend that splits it into tasks, against a float64
// softmax.
#include <cmath>
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "reference.h"

namespace sbd::cpu {
namespace {

using namespace test;

// A cache with known keys and values: multiples of 2^-8 below 2, so that a half holds them exactly
// and a bf16 does not. RoPE turns by no angle.
struct Cache {
  HeadShape heads;
  int n_ctx;
  std::unique_ptr<KvStorage> kv;
  std::vector<float> keys;    // [n_ctx][kv_heads][dim]
  std::vector<float> values;  // likewise
  std::vector<float> still;   // inverse frequencies

  Cache(CpuBackend& backend, const HeadShape& shape, int context, DType dtype, Random& random)
      : heads(shape),
        n_ctx(context),
        kv(backend.allocate_kv(1, shape, context, dtype)),
        still(static_cast<std::size_t>(shape.head_dim) / 2, 0.0f) {
    const int n = n_ctx * heads.num_key_value_heads * heads.head_dim;
    for (int i = 0; i < n; ++i) {
      keys.push_back(static_cast<float>(random.below(1025) - 512) * 0x1p-8f);
      values.push_back(static_cast<float>(random.below(1025) - 512) * 0x1p-8f);
    }
    write(backend, 0, keys, values);
  }

  // Keys and values at positions [first, ...).
  void write(CpuBackend& backend, int first, std::vector<float> k, const std::vector<float>& v) {
    const int n_rows = static_cast<int>(k.size()) / heads.num_key_value_heads / heads.head_dim;
    std::vector<int> positions(static_cast<std::size_t>(n_rows));
    std::iota(positions.begin(), positions.end(), first);
    const std::vector<TokenId> tokens(positions.size());
    const SequenceRows sequence{kv.get(), 0, n_rows};
    backend.begin({tokens, positions, positions, {&sequence, 1}}, still, false);
    std::vector<float> q(positions.size() * q_size());
    backend.rotate_and_cache(0, heads, nullptr, nullptr, 0.0f, q.data(), k.data(), v.data());
  }

  std::size_t q_size() const {
    return static_cast<std::size_t>(heads.num_attention_heads * heads.head_dim);
  }
};

// Rows of one or more sequences in one forward.
struct Part {
  Cache* cache;
  std::vector<int> kv_end;
};

std::vector<float> run_attention(CpuBackend& backend, const std::vector<Part>& parts,
                                 const std::vector<float>& q) {
  std::vector<int> kv_end;
  std::vector<SequenceRows> sequences;
  for (const Part& part : parts) {
    sequences.push_back({part.cache->kv.get(), static_cast<int>(kv_end.size()),
                         static_cast<int>(part.kv_end.size())});
    kv_end.insert(kv_end.end(), part.kv_end.begin(), part.kv_end.end());
  }
  const std::vector<TokenId> tokens(kv_end.size());
  backend.begin({tokens, kv_end, kv_end, sequences}, parts[0].cache->still, false);
  std::vector<float> out(q.size(), NAN);
  backend.attention(0, parts[0].cache->heads, q.data(), out.data());
  return out;
}

struct Expected {
  std::vector<double> values;
  std::vector<double> tolerance;
};

// Half a unit in the last place of a bf16 in [0.5, 1).
constexpr double kBf16Eps = 0x1p-9;

// What is rounded to bf16: keys and values, as the cache has them or as they are multiplied, and
// then queries and probabilities too.
struct Rounded {
  bool cache;
  bool products;
};

Rounded rounded_by(const Kernels* kernels, DType dtype) {
  const bool products = dtype != DType::f32 && kernels->short_interleave == 2;
  return {dtype == DType::bf16 || products, products};
}

constexpr DType kCacheTypes[] = {DType::f32, DType::f16, DType::bf16};

// The bound: a score is off by its roundings, so a probability by twice that and exp's own error;
// sums over n keys by n roundings, of terms that are at most the sum of magnitudes. What is rounded
// to bf16 is taken so; rounded probabilities: the weight of a value, one of them divided by the sum
// of all, is then off by twice that.
Expected expected_attention(const Cache& cache, const std::vector<int>& kv_end,
                            const std::vector<float>& q, Rounded rounded) {
  const auto as_read = [](float x, bool bf16) {
    return bf16 ? rounded_to_bf16(x) : static_cast<double>(x);
  };
  const int dim = cache.heads.head_dim;
  const int kv_heads = cache.heads.num_key_value_heads;
  const int group = cache.heads.num_attention_heads / kv_heads;
  Expected expected;
  for (std::size_t row = 0; row < kv_end.size(); ++row) {
    for (int head = 0; head < cache.heads.num_attention_heads; ++head) {
      const float* query = q.data() + row * cache.q_size() + head * dim;
      std::vector<double> p;
      double score_error = 0;
      for (int key = 0; key < kv_end[row]; ++key) {
        const float* k = cache.keys.data() + (key * kv_heads + head / group) * dim;
        double score = 0, magnitudes = 0;
        for (int d = 0; d < dim; ++d) {
          const double product = as_read(query[d], rounded.products) * as_read(k[d], rounded.cache);
          score += product;
          magnitudes += std::abs(product);
        }
        p.push_back(score / std::sqrt(dim));
        score_error = std::max(score_error, magnitudes / std::sqrt(dim) * (dim + 4) * kEps);
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - top);
      const double relative = 2 * score_error + 4e-7 + (kv_end[row] + 40) * kEps +
                              (rounded.products ? 1.01 * kBf16Eps : 0);
      for (int d = 0; d < dim; ++d) {
        double value = 0, magnitudes = 0;
        for (int key = 0; key < kv_end[row]; ++key) {
          const double v =
              as_read(cache.values[(key * kv_heads + head / group) * dim + d], rounded.cache);
          value += p[key] / sum * v;
          magnitudes += p[key] / sum * std::abs(v);
        }
        expected.values.push_back(value);
        expected.tolerance.push_back(magnitudes * 2 * relative);
      }
    }
  }
  return expected;
}

std::string place(const Kernels* kernels, const HeadShape& heads, DType dtype) {
  return std::string(kernels->name) + ", heads " + std::to_string(heads.num_attention_heads) + "/" +
         std::to_string(heads.num_key_value_heads) + " of " + std::to_string(heads.head_dim) +
         ", " + std::string(name(dtype));
}

// Every table and cache type against one reference, and each row alone against all together.
void check_attention(const HeadShape& heads, const std::vector<int>& kv_end) {
  const int n_ctx = *std::max_element(kv_end.begin(), kv_end.end());
  Expected expected[3];  // in float32, of a cache in bf16, all in bf16
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    for (const DType dtype : kCacheTypes) {
      Random random(static_cast<std::uint64_t>(heads.num_attention_heads * 1000 + heads.head_dim));
      Cache cache(backend, heads, n_ctx, dtype, random);
      const auto q = random.floats(kv_end.size() * cache.q_size(), -1.5, 1.5);
      const Rounded rounded = rounded_by(kernels, dtype);
      auto& [values, tolerance] = expected[rounded.cache + rounded.products];
      if (values.empty()) {
        Expected worked_out = expected_attention(cache, kv_end, q, rounded);
        values = worked_out.values;
        tolerance = worked_out.tolerance;
      }
      const auto all = run_attention(backend, {{&cache, kv_end}}, q);
      CHECK_CLOSE(place(kernels, heads, dtype), all, values, tolerance);
      for (std::size_t row = 0; row < kv_end.size(); ++row) {
        const auto at = static_cast<std::ptrdiff_t>(row * cache.q_size());
        const std::vector<float> one(q.begin() + at,
                                     q.begin() + at + static_cast<std::ptrdiff_t>(cache.q_size()));
        const auto alone = run_attention(backend, {{&cache, {kv_end[row]}}}, one);
        CHECK_IN(place(kernels, heads, dtype) + ", row " + std::to_string(row),
                 same_bits(alone.data(), all.data() + at, alone.size()));
      }
    }
  }
}

TEST(attention_of_every_head_shape) {
  for (const int dim : {2, 8, 10, 16, 24, 64, 80, 128}) {
    for (const int group : {1, 2, 3, 5, 40}) {
      const int kv_heads = group == 40 ? 1 : 2;
      check_attention({group * kv_heads, kv_heads, dim}, {1, 2, 15, 16, 17, 63, 64, 65, 100});
    }
  }
}

TEST(attention_over_long_contexts) {
  const std::vector<int> kv_end = {1023, 1, 1024, 1025, 500, 2047, 2048, 2049, 2100, 64};
  check_attention({4, 2, 64}, kv_end);
  check_attention({40, 1, 8}, kv_end);
  check_attention({3, 3, 24}, kv_end);
  check_attention({2, 1, 16}, {4097, 4096, 4095, 1});
  check_attention({8, 1, 256}, {511, 512, 513, 600});
}

// Every number of rows around the tiles' sizes, and more queries than a task holds.
TEST(attention_of_many_rows) {
  for (const int n_rows : {2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 67}) {
    std::vector<int> kv_end;
    for (int row = 0; row < n_rows; ++row) kv_end.push_back(60 + row * 29 % 83);
    check_attention({2, 1, 24}, kv_end);
    check_attention({8, 1, 16}, kv_end);
    check_attention({3, 3, 8}, kv_end);
  }
}

TEST(attention_of_causal_and_block_rows_in_one_forward) {
  std::vector<int> kv_end(16);
  std::iota(kv_end.begin(), kv_end.end(), 1018);  // a decided block, causal, over the split
  kv_end.insert(kv_end.end(), 16, 1049);          // and a block of masks behind it
  check_attention({6, 2, 16}, kv_end);
}

// A key that would take all of the probability decides whether it is seen.
TEST(attention_sees_the_last_key_and_not_the_next) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(1);
    for (const int last : {0, 15, 16, 63, 64, 1022, 1023, 1024, 1100}) {
      Random random(1);
      Cache cache(backend, {1, 1, 16}, 1200, DType::f16, random);
      std::vector<float> key(16, 50.0f), value(16, 7.0f);
      cache.write(backend, last, key, value);
      const std::vector<float> q(16, 1.0f);
      CHECK_NEAR(run_attention(backend, {{&cache, {last + 1}}}, q)[3], 7.0, 1e-6);
      if (last == 0) continue;
      CHECK(!(std::abs(run_attention(backend, {{&cache, {last}}}, q)[3]) > 2.0f));
    }
  }
}

TEST(attention_ignores_what_lies_behind_kv_end) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    for (const DType dtype : kCacheTypes) {
      for (const int end : {1, 15, 17, 64, 1000, 1024, 1030}) {
        Random random(2);
        Cache cache(backend, {4, 2, 24}, 1100, dtype, random);
        const auto q = random.floats(cache.q_size(), -1, 1);
        const auto clean = run_attention(backend, {{&cache, {end}}}, q);
        const auto garbage_size = static_cast<std::size_t>((1100 - end) * 2 * 24);
        for (const float garbage : {NAN, INFINITY, 60000.0f}) {
          cache.write(backend, end, std::vector<float>(garbage_size, garbage),
                      std::vector<float>(garbage_size, garbage));
          const auto dirty = run_attention(backend, {{&cache, {end}}}, q);
          CHECK_IN(place(kernels, cache.heads, dtype), same_bits(clean.data(), dirty.data(), 96));
        }
      }
    }
  }
}

// What rounding to bf16 costs where scores are about as large as a trained model's: no more than
// the roundings of value and probability, 2^-9 / sqrt(3) each in root mean square, and that of the
// scores, which is their size times as much.
TEST(attention_in_bf16_is_near_float64) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    Random random(11);
    Cache cache(backend, {4, 2, 128}, 700, DType::f16, random);
    const std::vector<int> kv_end = {1, 2, 30, 300, 600, 700};
    const auto q = random.floats(kv_end.size() * cache.q_size(), -1.5, 1.5);
    const Expected exact = expected_attention(cache, kv_end, q, {});
    const auto out = run_attention(backend, {{&cache, kv_end}}, q);
    double errors = 0, squares = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      errors += (out[i] - exact.values[i]) * (out[i] - exact.values[i]);
      squares += exact.values[i] * exact.values[i];
    }
    const double error = std::sqrt(errors / squares);
    const bool bf16 = rounded_by(kernels, DType::f16).products;
    CHECK_IN(std::string(kernels->name) + ": " + std::to_string(error),
             error < (bf16 ? 4 * kBf16Eps / std::sqrt(3.0) : 1e-6));
  }
}

TEST(attention_of_several_sequences_and_threads) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    std::vector<float> first;
    for (const int n_threads : {1, 2, 3, 5}) {
      CpuBackend backend(n_threads);
      Random random(3);
      const HeadShape heads{4, 2, 16};
      Cache a(backend, heads, 1500, DType::f16, random);
      Cache b(backend, heads, 40, DType::f16, random);
      const std::vector<Part> parts = {{&a, {1, 1400, 1500}}, {&b, {40, 3}}};
      const auto q = random.floats(5 * a.q_size(), -1, 1);
      const auto together = run_attention(backend, parts, q);
      if (first.empty()) first = together;
      CHECK(same_bits(first.data(), together.data(), first.size()));
      const auto split = static_cast<std::ptrdiff_t>(3 * a.q_size());
      const auto of_a = run_attention(backend, {parts[0]}, {q.begin(), q.begin() + split});
      const auto of_b = run_attention(backend, {parts[1]}, {q.begin() + split, q.end()});
      CHECK(same_bits(of_a.data(), together.data(), of_a.size()));
      CHECK(same_bits(of_b.data(), together.data() + split, of_b.size()));
    }
  }
}

// A key or value that is not finite makes its readers NaN; a silent 0 would hide the damage.
TEST(attention_passes_on_what_is_not_finite) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(1);
    for (const DType dtype : kCacheTypes) {
      for (const int at : {0, 7, 70}) {
        Random random(5);
        Cache cache(backend, {2, 1, 16}, 80, dtype, random);
        const auto q = random.floats(cache.q_size(), -1, 1);
        const std::vector<float> plain(16, 0.5f);
        std::vector<float> bad(16, 0.5f);
        bad[3] = NAN;
        cache.write(backend, at, bad, plain);
        const auto by_key = run_attention(backend, {{&cache, {80}}}, q);
        CHECK_IN(place(kernels, cache.heads, dtype) + ", key", std::isnan(by_key[0]));
        cache.write(backend, at, plain, bad);
        const auto by_value = run_attention(backend, {{&cache, {80}}}, q);
        CHECK_IN(place(kernels, cache.heads, dtype) + ", value", std::isnan(by_value[3]));
        CHECK(std::isfinite(by_value[2]));
      }
    }
  }
}

// Norm of each head, then RoPE by the row's position, then the cache.
TEST(rotate_and_cache_norms_turns_and_stores) {
  for (const Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    CpuBackend backend(2);
    for (const bool interleaved : {false, true}) {
      for (const bool normed : {false, true}) {
        constexpr int dim = 24;
        const HeadShape heads{6, 2, dim};
        for (const DType dtype : kCacheTypes) {
          const auto kv_storage = backend.allocate_kv(2, heads, 50, dtype);
          const auto& kv = static_cast<const CpuKv&>(*kv_storage);
          Random random(7);
          auto q = random.floats(3 * 6 * dim, -2, 2);
          auto k = random.floats(3 * 2 * dim, -2, 2);
          const auto v = random.floats(3 * 2 * dim, -2, 2);
          const auto norm = random.floats(2 * dim, 0.5, 2);
          std::vector<float> frequencies;
          for (int i = 0; i < dim / 2; ++i) {
            frequencies.push_back(static_cast<float>(std::pow(100.0, -2.0 * i / dim)));
          }
          const std::vector<int> positions = {17, 18, 31};
          const auto turned = [&](const std::vector<float>& x, int head_count,
                                  const float* weight) {
            std::vector<double> out;
            for (std::size_t at = 0; at < x.size(); at += dim) {
              const int position = positions[at / static_cast<std::size_t>(head_count * dim)];
              double scale = 1, head[dim];
              if (normed) {
                double squares = 0;
                for (int d = 0; d < dim; ++d) squares += static_cast<double>(x[at + d]) * x[at + d];
                scale = 1 / std::sqrt(squares / dim + 1e-6);
              }
              for (int d = 0; d < dim; ++d) head[d] = x[at + d] * scale * (normed ? weight[d] : 1);
              for (int i = 0; i < dim / 2; ++i) {
                const double angle = position * static_cast<double>(frequencies[i]);
                double& a = head[interleaved ? 2 * i : i];
                double& b = head[interleaved ? 2 * i + 1 : i + dim / 2];
                const double before = a;
                a = a * std::cos(angle) - b * std::sin(angle);
                b = before * std::sin(angle) + b * std::cos(angle);
              }
              out.insert(out.end(), head, head + dim);
            }
            return out;
          };
          const auto expected_q = turned(q, 6, norm.data());
          const auto expected_k = turned(k, 2, norm.data() + dim);
          const std::vector<TokenId> tokens(3);
          const SequenceRows sequence{kv_storage.get(), 0, 3};
          backend.begin({tokens, positions, positions, {&sequence, 1}}, frequencies, interleaved);
          backend.rotate_and_cache(1, heads, normed ? norm.data() : nullptr,
                                   normed ? norm.data() + dim : nullptr, 1e-6f, q.data(), k.data(),
                                   v.data());
          // An angle near 31 is off by half a unit in its last place.
          const std::vector<double> tolerance(q.size(), 8 * (31 + 20) * kEps);
          CHECK_CLOSE(place(kernels, heads, dtype), q, expected_q, tolerance);
          std::vector<float> stored_k, stored_v;
          const int u = kv.interleave();
          CHECK_EQ(u, dtype == DType::f32 ? 1 : kernels->short_interleave);
          const auto element = [&](const std::uint8_t* base, int at) {
            if (dtype == DType::f32) return reinterpret_cast<const float*>(base)[at];
            const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(base)[at];
            return dtype == DType::f16 ? half_to_float(bits) : bf16_to_float(bits);
          };
          for (int row = 0; row < 3; ++row) {
            for (int head = 0; head < 2; ++head) {
              const int position = positions[row];
              for (int d = 0; d < dim; ++d) {
                const int key_at =
                    (position / 16 * (dim / u) + d / u) * 16 * u + position % 16 * u + d % u;
                const int value_at = (position / u * kv.padded_dim() + d) * u + position % u;
                stored_k.push_back(element(kv.keys(1, head), key_at));
                stored_v.push_back(element(kv.values(1, head), value_at));
              }
              CHECK(element(kv.keys(0, head), position % 16 * u) == 0.0f);
            }
          }
          double rounding = 0;
          if (dtype == DType::f16) rounding = 0x1p-11;
          if (dtype == DType::bf16) rounding = 0x1p-8;
          std::vector<double> stored_tolerance, value_tolerance;
          for (const double x : expected_k) {
            stored_tolerance.push_back(tolerance[0] + std::abs(x) * rounding);
          }
          for (const float x : v) value_tolerance.push_back(std::abs(x) * rounding);
          CHECK_CLOSE(place(kernels, heads, dtype), stored_k, expected_k, stored_tolerance);
          CHECK_CLOSE(place(kernels, heads, dtype), stored_v,
                      std::vector<double>(v.begin(), v.end()), value_tolerance);
        }
      }
    }
  }
}

}  // namespace
}  // namespace sbd::cpu
