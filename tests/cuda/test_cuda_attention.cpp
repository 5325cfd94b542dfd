// Norm, RoPE, cache and attention against float64.
#include <cmath>
#include <numeric>

#include "backend/cuda/kv.h"
#include "cuda_check.h"

namespace sbd::cuda {
namespace {

using namespace test;

double rounded_to(DType dtype, double x) {
  return dtype == DType::f16 ? rounded_to_half(x) : dtype == DType::bf16 ? rounded_to_bf16(x) : x;
}

// What a value rounded to a type is off by at most, as a share of it.
double rounding(DType dtype) {
  return dtype == DType::f16 ? 0x1p-11 : dtype == DType::bf16 ? 0x1p-8 : 0;
}

// A cache that was given random keys and values. RoPE turns by no angle.
struct Cache {
  HeadShape heads;
  int n_ctx;
  DType dtype;
  std::unique_ptr<KvStorage> kv;
  std::vector<float> keys;    // [n_ctx][kv_heads][dim], as the cache's type holds them
  std::vector<float> values;  // likewise
  std::vector<float> still;   // inverse frequencies

  Cache(CudaBackend& backend, const HeadShape& shape, int context, DType type, Random& random)
      : heads(shape),
        n_ctx(context),
        dtype(type),
        kv(backend.allocate_kv(2, shape, context, type)),
        still(static_cast<std::size_t>(shape.head_dim) / 2, 0.0f) {
    const auto n = static_cast<std::size_t>(n_ctx * heads.num_key_value_heads * heads.head_dim);
    keys = random.floats(n, -2, 2);
    values = random.floats(n, -2, 2);
    write(backend, 0, keys, values);
    for (float& x : keys) x = static_cast<float>(rounded_to(dtype, x));
    for (float& x : values) x = static_cast<float>(rounded_to(dtype, x));
  }

  // Keys and values at positions [first, ...).
  void write(CudaBackend& backend, int first, const std::vector<float>& k,
             const std::vector<float>& v) {
    const auto n_rows =
        k.size() / static_cast<std::size_t>(heads.num_key_value_heads * heads.head_dim);
    std::vector<int> positions(n_rows);
    std::iota(positions.begin(), positions.end(), first);
    const SequenceRows sequence{kv.get(), 0, static_cast<int>(n_rows)};
    backend.begin({positions, positions, positions, {&sequence, 1}}, still, false);
    const Buffer q = backend.upload(std::vector<float>(n_rows * q_size()));
    const Buffer kb = backend.upload(k), vb = backend.upload(v);
    backend.rotate_and_cache(1, heads, nullptr, nullptr, 0.0f, q.get(), kb.get(), vb.get());
    backend.finish();
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

std::vector<float> run_attention(CudaBackend& backend, const std::vector<Part>& parts,
                                 const std::vector<float>& q) {
  std::vector<int> kv_end;
  std::vector<SequenceRows> sequences;
  for (const Part& part : parts) {
    sequences.push_back({part.cache->kv.get(), static_cast<int>(kv_end.size()),
                         static_cast<int>(part.kv_end.size())});
    kv_end.insert(kv_end.end(), part.kv_end.begin(), part.kv_end.end());
  }
  backend.begin({kv_end, kv_end, kv_end, sequences}, parts[0].cache->still, false);
  const Buffer in = backend.upload(q);
  const Buffer out = backend.upload(std::vector<float>(q.size(), NAN));
  backend.attention(1, parts[0].cache->heads, in.get(), out.get());
  return backend.download(out.get(), q.size());
}

// The reference rounds queries as the kernel does; the tolerance is for probabilities rounded to
// the cache's type, and for float32.
void check_close(const std::string& where, const Cache& cache, const std::vector<int>& kv_end,
                 const std::vector<float>& q, const std::vector<float>& out) {
  const int dim = cache.heads.head_dim;
  const int kv_heads = cache.heads.num_key_value_heads;
  const int group = cache.heads.num_attention_heads / kv_heads;
  std::vector<double> expected, tolerance;
  for (std::size_t row = 0; row < kv_end.size(); ++row) {
    for (int head = 0; head < cache.heads.num_attention_heads; ++head) {
      const float* query = q.data() + row * cache.q_size() + head * dim;
      const auto at = [&](int key) {
        return static_cast<std::size_t>((key * kv_heads + head / group) * dim);
      };
      std::vector<double> p;
      double score_error = 0;
      for (int key = 0; key < kv_end[row]; ++key) {
        double score = 0, magnitudes = 0;
        for (int d = 0; d < dim; ++d) {
          const double product =
              rounded_to(cache.dtype, query[d]) * cache.keys[at(key) + static_cast<std::size_t>(d)];
          score += product;
          magnitudes += std::abs(product);
        }
        p.push_back(score / std::sqrt(dim));
        score_error = std::max(score_error, magnitudes / std::sqrt(dim) * (dim + 4) * kEps);
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - top);
      const double relative =
          2 * (2 * score_error + 2e-6 + (kv_end[row] + 40) * kEps) + 1.01 * rounding(cache.dtype);
      // A probability below a half's normal numbers is off by half of its smallest unit.
      const double absolute = cache.dtype == DType::f16 ? kv_end[row] * 0x1p-25 * 2 : 0;
      for (int d = 0; d < dim; ++d) {
        double value = 0, magnitudes = 0;
        for (int key = 0; key < kv_end[row]; ++key) {
          const double v = cache.values[at(key) + static_cast<std::size_t>(d)];
          value += p[static_cast<std::size_t>(key)] / sum * v;
          magnitudes += p[static_cast<std::size_t>(key)] / sum * std::abs(v);
        }
        expected.push_back(value);
        tolerance.push_back(magnitudes * relative + absolute);
      }
    }
  }
  CHECK_CLOSE(where, out, expected, tolerance);
}

// Every type of cache against the reference, and each row alone against all together.
void check_attention(const HeadShape& heads, const std::vector<int>& kv_end) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    const std::string where = "heads " + std::to_string(heads.num_attention_heads) + "/" +
                              std::to_string(heads.num_key_value_heads) + " of " +
                              std::to_string(heads.head_dim) + ", " + std::string(name(dtype));
    Random random(static_cast<std::uint64_t>(heads.num_attention_heads * 1000 + heads.head_dim));
    Cache cache(backend, heads, *std::max_element(kv_end.begin(), kv_end.end()), dtype, random);
    const auto q = random.floats(kv_end.size() * cache.q_size(), -1.5, 1.5);
    const auto all = run_attention(backend, {{&cache, kv_end}}, q);
    check_close(where, cache, kv_end, q, all);
    for (const std::size_t row : {std::size_t{0}, kv_end.size() / 2, kv_end.size() - 1}) {
      const auto at = static_cast<std::ptrdiff_t>(row * cache.q_size());
      const std::vector<float> one(q.begin() + at,
                                   q.begin() + at + static_cast<std::ptrdiff_t>(cache.q_size()));
      const auto alone = run_attention(backend, {{&cache, {kv_end[row]}}}, one);
      CHECK_IN(where + ", row " + std::to_string(row),
               same_bits(alone.data(), all.data() + at, alone.size()));
    }
  }
}

TEST(cuda_attention_of_every_head_shape) {
  for (const int dim : {2, 8, 10, 24, 64, 80, 128, 256}) {
    for (const int group : {1, 3, 40}) {
      if (dim > 80 && group != 3) continue;
      const int kv_heads = group == 40 ? 1 : 2;
      check_attention({group * kv_heads, kv_heads, dim}, {1, 2, 16, 17, 63, 64, 65, 100});
    }
  }
}

TEST(cuda_attention_over_long_contexts) {
  check_attention({4, 2, 64}, {1023, 1, 1024, 500, 2047, 2048, 2049, 2100, 64});
  check_attention({2, 1, 16}, {4097, 3073, 3072, 1});
}

// A cache takes pages as positions are used.
TEST(cuda_attention_over_a_cache_that_has_grown) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    Random random(4);
    const HeadShape heads{2, 2, 10};
    Cache cache(backend, heads, 5000, dtype, random);
    const std::size_t position = 2 * 10;  // floats
    cache.kv = backend.allocate_kv(2, heads, 5000, dtype);
    for (const auto& [first, end] : {std::pair{0, 700}, {700, 2049}, {2049, 2100}, {2100, 5000}}) {
      const auto part = [&, first = first, end = end](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + first * static_cast<std::ptrdiff_t>(position),
                                  all.begin() + end * static_cast<std::ptrdiff_t>(position));
      };
      cache.write(backend, first, part(cache.keys), part(cache.values));
    }
    const std::vector<int> kv_end = {5000, 700, 2100};
    const auto q = random.floats(kv_end.size() * cache.q_size(), -1, 1);
    check_close("grown " + std::string(name(dtype)), cache, kv_end, q,
                run_attention(backend, {{&cache, kv_end}}, q));
  }
}

// Positions in several pages are taken over; what is given up leaves its pages.
TEST(cuda_attention_over_a_copied_cache) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    Random random(8);
    const HeadShape heads{2, 1, 10};
    Cache cache(backend, heads, 2500, dtype, random);
    auto copy = backend.allocate_kv(2, heads, 2500, dtype);
    copy->copy(*cache.kv, 2100);
    CHECK_EQ(static_cast<const CudaKv&>(*copy).pages().size(), 3u);
    copy->truncate(2000);
    CHECK_EQ(static_cast<const CudaKv&>(*copy).pages().size(), 2u);
    const auto bytes = [&](int n) { return backend.kv_bytes(2, heads, 2500, dtype, n); };
    CHECK_EQ(bytes(1), bytes(1024));
    CHECK_EQ(bytes(1025), 2 * bytes(1));
    cache.kv = std::move(copy);
    const std::vector<int> kv_end = {2000, 1024, 1025, 3};
    const auto q = random.floats(kv_end.size() * cache.q_size(), -1, 1);
    check_close("copied", cache, kv_end, q, run_attention(backend, {{&cache, kv_end}}, q));
  }
}

// What a cache left in its pages is nothing to the next one: behind head_dim it is zeros again.
TEST(cuda_attention_over_pages_of_another_cache) {
  CudaBackend backend(0);
  const HeadShape heads{2, 1, 10};
  constexpr int kLong = 300, kShort = 200;  // of F16 and F32: pages of the same size
  for (const float left : {NAN, 3.0f}) {
    const std::uint8_t* page = nullptr;
    {
      Random random(6);
      Cache first(backend, heads, kShort, DType::f32, random);
      const std::vector<float> all(kShort * 10, left);
      first.write(backend, 0, all, all);
      page = static_cast<const CudaKv&>(*first.kv).pages()[0].as<std::uint8_t>();
    }
    Random random(7);
    Cache second(backend, heads, kLong, DType::f16, random);
    CHECK_EQ(static_cast<const CudaKv&>(*second.kv).pages()[0].as<std::uint8_t>(), page);
    const std::vector<int> kv_end = {kLong, 7};
    const auto q = random.floats(kv_end.size() * second.q_size(), -1, 1);
    check_close("pages of another", second, kv_end, q,
                run_attention(backend, {{&second, kv_end}}, q));
  }
}

TEST(cuda_attention_of_many_rows) {
  for (const int n_rows : {2, 7, 17, 33, 67}) {
    std::vector<int> kv_end;
    for (int row = 0; row < n_rows; ++row) kv_end.push_back(60 + row * 29 % 83);
    check_attention({8, 2, 24}, kv_end);
    check_attention({3, 3, 8}, kv_end);
  }
}

TEST(cuda_attention_sees_the_last_key_and_not_the_next) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    for (const int last : {0, 15, 63, 64, 1023, 1100}) {
      Random random(1);
      Cache cache(backend, {1, 1, 16}, 1200, dtype, random);
      cache.write(backend, last, std::vector<float>(16, 50.0f), std::vector<float>(16, 7.0f));
      const std::vector<float> q(16, 1.0f);
      CHECK_NEAR(run_attention(backend, {{&cache, {last + 1}}}, q)[3], 7.0, 1e-6);
      if (last == 0) continue;
      CHECK(!(std::abs(run_attention(backend, {{&cache, {last}}}, q)[3]) > 2.0f));
    }
  }
}

TEST(cuda_attention_ignores_what_lies_behind_kv_end) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    for (const int end : {1, 17, 64, 1000}) {
      Random random(2);
      Cache cache(backend, {4, 2, 24}, 1100, dtype, random);
      const auto q = random.floats(cache.q_size(), -1, 1);
      const auto clean = run_attention(backend, {{&cache, {end}}}, q);
      const auto garbage_size = static_cast<std::size_t>((1100 - end) * 2 * 24);
      for (const float garbage : {NAN, INFINITY}) {
        cache.write(backend, end, std::vector<float>(garbage_size, garbage),
                    std::vector<float>(garbage_size, garbage));
        const auto dirty = run_attention(backend, {{&cache, {end}}}, q);
        CHECK(same_bits(clean.data(), dirty.data(), 96));
      }
    }
  }
}

TEST(cuda_attention_of_several_sequences) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    Random random(3);
    const HeadShape heads{4, 2, 16};
    Cache a(backend, heads, 1500, dtype, random), b(backend, heads, 40, dtype, random);
    const std::vector<Part> parts = {{&a, {1, 1400, 1500}}, {&b, {40, 3}}};
    const auto q = random.floats(5 * a.q_size(), -1, 1);
    const auto together = run_attention(backend, parts, q);
    const auto split = static_cast<std::ptrdiff_t>(3 * a.q_size());
    const auto of_a = run_attention(backend, {parts[0]}, {q.begin(), q.begin() + split});
    const auto of_b = run_attention(backend, {parts[1]}, {q.begin() + split, q.end()});
    CHECK(same_bits(of_a.data(), together.data(), of_a.size()));
    CHECK(same_bits(of_b.data(), together.data() + split, of_b.size()));
  }
}

// A key or value that is not finite makes its readers NaN; a silent 0 would hide the damage.
TEST(cuda_attention_passes_on_what_is_not_finite) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    for (const int at : {0, 7, 70}) {
      for (const float bad_value : {NAN, INFINITY, -INFINITY}) {
        Random random(5);
        Cache cache(backend, {2, 1, 16}, 80, dtype, random);
        const auto q = random.floats(cache.q_size(), -1, 1);
        const std::vector<float> plain(16, 0.5f);
        std::vector<float> bad(16, 0.5f);
        bad[3] = bad_value;
        cache.write(backend, at, bad, plain);
        CHECK(std::isnan(run_attention(backend, {{&cache, {80}}}, q)[0]));
        cache.write(backend, at, plain, bad);
        const auto by_value = run_attention(backend, {{&cache, {80}}}, q);
        CHECK(!std::isfinite(by_value[3]));
        CHECK(std::isfinite(by_value[2]));
      }
    }
  }
}

// A value of a cache, read from its memory.
double stored(const CudaKv& kv, const HeadShape& heads, int layer, bool value, int head,
              int position, int d) {
  const Index run = (Index{layer} * 2 + value) * heads.num_key_value_heads + head;
  const Index place = run * kv.info(0).capacity + position % kPagePositions;
  const Index at = place * CudaKv::stride(heads, kv.dtype()) + d;
  const auto* page = kv.pages()[static_cast<std::size_t>(position / kPagePositions)].as<char>();
  const auto size = static_cast<Index>(bytes_per_block(kv.dtype()));
  std::uint32_t bits = 0;
  check(cudaMemcpy(&bits, page + at * size, static_cast<std::size_t>(size), cudaMemcpyDeviceToHost),
        "reading a cache");
  switch (kv.dtype()) {
    case DType::f16: return half_to_float(static_cast<std::uint16_t>(bits));
    case DType::bf16: return bf16_to_float(static_cast<std::uint16_t>(bits));
    default: return std::bit_cast<float>(bits);
  }
}

constexpr int kDim = 24;

// Heads [rows][n_heads][kDim], normed and turned.
std::vector<double> rotated(const std::vector<float>& x, int n_heads, const float* norm,
                            const std::vector<int>& positions,
                            const std::vector<float>& frequencies, bool interleaved) {
  std::vector<double> result;
  for (std::size_t at = 0; at < x.size(); at += kDim) {
    const std::size_t row = at / static_cast<std::size_t>(n_heads * kDim);
    double head[kDim], squares = 0;
    for (std::size_t d = 0; d < kDim; ++d) {
      head[d] = x[at + d];
      squares += head[d] * head[d];
    }
    if (norm != nullptr) {
      for (int d = 0; d < kDim; ++d) head[d] *= norm[d] / std::sqrt(squares / kDim + 1e-6);
    }
    for (int i = 0; i < kDim / 2; ++i) {
      const double angle =
          positions[row] * static_cast<double>(frequencies[static_cast<std::size_t>(i)]);
      double& a = head[interleaved ? 2 * i : i];
      double& b = head[interleaved ? 2 * i + 1 : i + kDim / 2];
      const double before = a;
      a = a * std::cos(angle) - b * std::sin(angle);
      b = before * std::sin(angle) + b * std::cos(angle);
    }
    result.insert(result.end(), head, head + kDim);
  }
  return result;
}

// Norm of each head, then RoPE by the row's position, then the queries' scale; keys and values are
// read from the cache's memory.
void check_rotate_and_cache(CudaBackend& backend, DType dtype, bool interleaved, bool normed) {
  const HeadShape heads{6, 2, kDim};
  Random random(7);
  const auto q = random.floats(3 * 6 * kDim, -2, 2), k = random.floats(3 * 2 * kDim, -2, 2),
             v = random.floats(3 * 2 * kDim, -2, 2), norm = random.floats(2 * kDim, 0.5, 2);
  std::vector<float> frequencies;
  for (int i = 0; i < kDim / 2; ++i) {
    frequencies.push_back(static_cast<float>(std::pow(100.0, -2.0 * i / kDim)));
  }
  const std::vector<int> positions = {17, 18, 31};
  const std::vector<float> scales = {1.0f, 2.0f, 0.5f};
  const auto storage = backend.allocate_kv(2, heads, 50, dtype);
  const auto& kv = static_cast<const CudaKv&>(*storage);
  const SequenceRows sequence{storage.get(), 0, 3};
  const Buffer qb = backend.upload(q), kb = backend.upload(k), vb = backend.upload(v),
               nb = backend.upload(norm);
  backend.begin({positions, positions, positions, {&sequence, 1}, scales}, frequencies,
                interleaved);
  backend.rotate_and_cache(1, heads, normed ? nb.get() : nullptr,
                           normed ? nb.get() + kDim : nullptr, 1e-6f, qb.get(), kb.get(), vb.get());
  const auto of = [&](const std::vector<float>& x, int n_heads, const float* weight) {
    return rotated(x, n_heads, normed ? weight : nullptr, positions, frequencies, interleaved);
  };
  const double tolerance = 16 * (31 + 20) * kEps;
  auto expected = of(q, 6, norm.data());
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] *= scales[i / (6 * kDim)];
  CHECK_CLOSE("queries", backend.download(qb.get(), q.size()), expected,
              std::vector<double>(expected.size(), tolerance));
  const auto keys = of(k, 2, norm.data() + kDim);
  for (int row = 0; row < 3; ++row) {
    for (int head = 0; head < 2; ++head) {
      for (int d = 0; d < kDim; ++d) {
        const auto at = static_cast<std::size_t>((row * 2 + head) * kDim + d);
        const int position = positions[static_cast<std::size_t>(row)];
        CHECK_NEAR(stored(kv, heads, 1, false, head, position, d), keys[at],
                   tolerance + std::abs(keys[at]) * rounding(dtype));
        CHECK_EQ(stored(kv, heads, 1, true, head, position, d), rounded_to(dtype, v[at]));
      }
    }
  }
}

TEST(cuda_rotate_and_cache_norms_turns_and_stores) {
  CudaBackend backend(0);
  for (const DType dtype : kCacheTypes) {
    for (const bool interleaved : {false, true}) {
      for (const bool normed : {false, true}) {
        check_rotate_and_cache(backend, dtype, interleaved, normed);
      }
    }
  }
}

}  // namespace
}  // namespace sbd::cuda
