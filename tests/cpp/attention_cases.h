// Attention of any backend against a float64 softmax, and what it does with the cache.
#pragma once

#include <cmath>
#include <map>
#include <numeric>

#include "check.h"
#include "core/bytes.h"
#include "device.h"
#include "reference.h"

namespace sbd::test {

// A cache that was given random keys and values, in the second of its two layers. RoPE turns by no
// angle.
struct FilledCache {
  HeadShape heads;
  DType dtype;
  std::unique_ptr<KvStorage> kv;
  std::vector<float> keys;    // [n_ctx][kv_heads][dim], as they were given
  std::vector<float> values;  // likewise
  std::vector<float> still;   // inverse frequencies

  FilledCache(Device& device, const HeadShape& shape, int n_ctx, DType type, Random& random)
      : heads(shape),
        dtype(type),
        kv(device.backend().allocate_kv(2, shape, n_ctx, type)),
        still(static_cast<std::size_t>(shape.head_dim) / 2, 0.0f) {
    const auto n = static_cast<std::size_t>(n_ctx * heads.num_key_value_heads * heads.head_dim);
    keys = random.floats(n, -2, 2);
    values = random.floats(n, -2, 2);
    write(device, 0, keys, values);
  }

  // Keys and values at positions [first, ...).
  void write(Device& device, int first, std::span<const float> k, std::span<const float> v) {
    const auto n_rows =
        k.size() / static_cast<std::size_t>(heads.num_key_value_heads * heads.head_dim);
    std::vector<int> positions(n_rows);
    std::iota(positions.begin(), positions.end(), first);
    const std::vector<TokenId> tokens(n_rows);
    const SequenceRows sequence{kv.get(), 0, static_cast<int>(n_rows)};
    Backend& backend = device.backend();
    backend.begin({tokens, positions, positions, {&sequence, 1}}, still, false);
    const Buffer q = backend.upload(std::vector<float>(n_rows * q_size()));
    const Buffer kb = backend.upload(k), vb = backend.upload(v);
    backend.rotate_and_cache(1, heads, nullptr, nullptr, 0.0f, q.get(), kb.get(), vb.get());
    device.download(q.get(), 1);  // it has been done
  }

  std::size_t q_size() const {
    return static_cast<std::size_t>(heads.num_attention_heads * heads.head_dim);
  }
};

// Rows of one or more sequences in one forward.
struct RowsOf {
  const FilledCache* cache;
  std::vector<int> kv_end;
  std::vector<Interval> unseen = {};  // of each row; none: nothing
};

inline std::vector<float> attend(Device& device, const std::vector<RowsOf>& parts,
                                 const std::vector<float>& q) {
  std::vector<int> kv_end;
  std::vector<Interval> unseen;
  std::vector<SequenceRows> sequences;
  for (const RowsOf& part : parts) {
    sequences.push_back({part.cache->kv.get(), static_cast<int>(kv_end.size()),
                         static_cast<int>(part.kv_end.size())});
    kv_end.insert(kv_end.end(), part.kv_end.begin(), part.kv_end.end());
    unseen.insert(unseen.end(), part.unseen.begin(), part.unseen.end());
  }
  const std::vector<TokenId> tokens(kv_end.size());
  Backend& backend = device.backend();
  ForwardRows rows{tokens, kv_end, kv_end, sequences};
  rows.unseen = unseen;
  backend.begin(rows, parts[0].cache->still, false);
  const Buffer in = backend.upload(q);
  const Buffer out = backend.upload(std::vector<float>(q.size(), NAN));
  backend.attention(1, parts[0].cache->heads, in.get(), out.get());
  return device.download(out.get(), q.size());
}

struct Expected {
  std::vector<double> values;
  std::vector<double> tolerance;
};

// The bound: a score is off by its roundings, so a probability by twice that and exp's own error;
// sums over n keys by n roundings, of terms that are at most the sum of magnitudes. Queries, keys
// and values are rounded as the backend does; rounded probabilities: the weight of a value, one of
// them divided by the sum of all, is then off by twice that.
inline Expected expected_attention(const FilledCache& cache, const std::vector<int>& kv_end,
                                   const std::vector<float>& q, DType multiplied, double exp_error,
                                   const std::vector<Interval>& unseen = {}) {
  const auto as_read = [&](const std::vector<float>& given, DType held) {
    std::vector<double> result = rounded_to(held, given);
    for (double& x : result) x = rounded_to(multiplied, x);
    return result;
  };
  const auto keys = as_read(cache.keys, cache.dtype), values = as_read(cache.values, cache.dtype),
             queries = as_read(q, DType::f32);
  const int dim = cache.heads.head_dim;
  const int kv_heads = cache.heads.num_key_value_heads;
  const int group = cache.heads.num_attention_heads / kv_heads;
  Expected expected;
  for (std::size_t row = 0; row < kv_end.size(); ++row) {
    for (int head = 0; head < cache.heads.num_attention_heads; ++head) {
      const double* query = queries.data() + row * cache.q_size() + head * dim;
      const auto at = [&](int key) {
        return static_cast<std::size_t>((key * kv_heads + head / group) * dim);
      };
      std::vector<double> p;
      double score_error = 0;
      for (int key = 0; key < kv_end[row]; ++key) {
        double score = 0, magnitudes = 0;
        const double* its = keys.data() + at(key);
        for (int d = 0; d < dim; ++d) {
          const double product = query[d] * its[d];
          score += product;
          magnitudes += std::abs(product);
        }
        const bool hidden = !unseen.empty() && key >= unseen[row].begin && key < unseen[row].end;
        p.push_back(hidden ? -INFINITY : score / std::sqrt(dim));
        score_error = std::max(score_error, magnitudes / std::sqrt(dim) * (dim + 4) * kEps);
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - top);
      const double relative = 2 * (2 * score_error + exp_error + (kv_end[row] + 40) * kEps) +
                              1.01 * rounding(multiplied);
      // A probability below a half's normal numbers is off by half of its smallest unit.
      const double absolute = multiplied == DType::f16 ? kv_end[row] * 0x1p-25 * 2 : 0;
      std::vector<double> value(static_cast<std::size_t>(dim)), magnitudes = value;
      for (int key = 0; key < kv_end[row]; ++key) {
        const double* its = values.data() + at(key);
        const double share = p[static_cast<std::size_t>(key)] / sum;
        double *to = value.data(), *size = magnitudes.data();
        for (int d = 0; d < dim; ++d) {
          to[d] += share * its[d];
          size[d] += share * std::abs(its[d]);
        }
      }
      for (std::size_t d = 0; d < value.size(); ++d) {
        expected.values.push_back(value[d]);
        expected.tolerance.push_back(magnitudes[d] * relative + absolute);
      }
    }
  }
  return expected;
}

inline std::string place(const Device& device, const HeadShape& heads, DType dtype) {
  return device.name() + ", heads " + std::to_string(heads.num_attention_heads) + "/" +
         std::to_string(heads.num_key_value_heads) + " of " + std::to_string(heads.head_dim) +
         ", " + std::string(name(dtype));
}

inline void check_close(Device& device, const FilledCache& cache, const std::vector<int>& kv_end,
                        const std::vector<float>& q) {
  const Expected expected =
      expected_attention(cache, kv_end, q, device.multiplied(cache.dtype), device.exp_error());
  CHECK_CLOSE(place(device, cache.heads, cache.dtype), attend(device, {{&cache, kv_end}}, q),
              expected.values, expected.tolerance);
}

// Every type of cache against the reference, and rows alone against all together: those named, or
// every one.
inline void check_attention(const std::vector<MakeDevice>& devices, const HeadShape& heads,
                            const std::vector<int>& kv_end, std::vector<std::size_t> alone = {}) {
  if (alone.empty()) {
    alone.resize(kv_end.size());
    std::iota(alone.begin(), alone.end(), std::size_t{0});
  }
  const int n_ctx = *std::max_element(kv_end.begin(), kv_end.end());
  std::map<std::pair<DType, DType>, Expected> known;
  for (const MakeDevice& make : devices) {
    const auto device = make();
    for (const DType dtype : device->cache_types(heads.head_dim)) {
      Random random(static_cast<std::uint64_t>(heads.num_attention_heads * 1000 + heads.head_dim));
      const FilledCache cache(*device, heads, n_ctx, dtype, random);
      const auto q = random.floats(kv_end.size() * cache.q_size(), -1.5, 1.5);
      const DType multiplied = device->multiplied(dtype);
      Expected& expected = known[{dtype, multiplied}];
      if (expected.values.empty()) {
        expected = expected_attention(cache, kv_end, q, multiplied, device->exp_error());
      }
      const auto all = attend(*device, {{&cache, kv_end}}, q);
      const std::string where = place(*device, heads, dtype);
      CHECK_CLOSE(where, all, expected.values, expected.tolerance);
      for (const std::size_t row : alone) {
        const auto at = static_cast<std::ptrdiff_t>(row * cache.q_size());
        const std::vector<float> one(q.begin() + at,
                                     q.begin() + at + static_cast<std::ptrdiff_t>(cache.q_size()));
        const auto lone = attend(*device, {{&cache, {kv_end[row]}}}, one);
        CHECK_IN(where + ", row " + std::to_string(row),
                 same_bits(lone.data(), all.data() + at, lone.size()));
      }
    }
  }
}

// Rows that do not see all keys before their end: intervals within a step, over all of one and over
// a split's first, at the first key and up to the row's own, and none.
inline void check_unseen(const std::vector<MakeDevice>& devices, const HeadShape& heads) {
  const std::vector<int> kv_end = {40, 40, 70, 130, 700, 1030, 1030, 1200, 2100, 1};
  const std::vector<Interval> unseen = {{10, 38},   {0, 39},      {60, 68},     {64, 129},
                                        {500, 600}, {1020, 1028}, {1000, 1000}, {1000, 1100},
                                        {7, 70},    {0, 0}};
  for (const MakeDevice& make : devices) {
    const auto device = make();
    for (const DType dtype : device->cache_types(heads.head_dim)) {
      Random random(9);
      const FilledCache cache(*device, heads, 2100, dtype, random);
      const auto q = random.floats(kv_end.size() * cache.q_size(), -1.5, 1.5);
      const Expected expected = expected_attention(cache, kv_end, q, device->multiplied(dtype),
                                                   device->exp_error(), unseen);
      const auto out = attend(*device, {{&cache, kv_end, unseen}}, q);
      CHECK_CLOSE(place(*device, heads, dtype), out, expected.values, expected.tolerance);
    }
  }
}

// A key that would take all of the probability decides whether it is seen.
inline void check_last_key(Device& device, const std::vector<int>& places) {
  constexpr float kValue = 127 / 16.0f;  // every type has it
  for (const DType dtype : device.cache_types(32)) {
    for (const int last : places) {
      Random random(1);
      FilledCache cache(device, {1, 1, 32}, 1200, dtype, random);
      cache.write(device, last, std::vector<float>(32, 50.0f), std::vector<float>(32, kValue));
      const std::vector<float> q(32, 1.0f);
      CHECK_NEAR(attend(device, {{&cache, {last + 1}}}, q)[3], kValue, 1e-6);
      if (last == 0) continue;
      CHECK(!(std::abs(attend(device, {{&cache, {last}}}, q)[3]) > 2.0f));
    }
  }
}

// The smallest head of at least that size that a cache of the type holds.
inline int head_of(DType dtype, int dim) { return round_up(dim, values_per_block(dtype)); }

inline void check_behind_kv_end(Device& device, const std::vector<int>& ends) {
  for (const DType dtype : device.cache_types(32)) {
    const int dim = head_of(dtype, 24);
    for (const int end : ends) {
      Random random(2);
      FilledCache cache(device, {4, 2, dim}, 1100, dtype, random);
      const auto q = random.floats(cache.q_size(), -1, 1);
      const auto clean = attend(device, {{&cache, {end}}}, q);
      const auto garbage_size = static_cast<std::size_t>((1100 - end) * 2 * dim);
      for (const float garbage : {NAN, INFINITY, 60000.0f}) {
        const std::vector<float> behind(garbage_size, garbage);
        cache.write(device, end, behind, behind);
        const auto dirty = attend(device, {{&cache, {end}}}, q);
        CHECK_IN(place(device, cache.heads, dtype),
                 same_bits(clean.data(), dirty.data(), clean.size()));
      }
    }
  }
}

// Two sequences in one forward, each as alone; returns what they gave.
inline std::vector<float> check_sequences(Device& device, DType dtype) {
  Random random(3);
  const HeadShape heads{4, 2, head_of(dtype, 16)};
  const FilledCache a(device, heads, 1500, dtype, random), b(device, heads, 40, dtype, random);
  const std::vector<RowsOf> parts = {{&a, {1, 1400, 1500}}, {&b, {40, 3}}};
  const auto q = random.floats(5 * a.q_size(), -1, 1);
  const auto together = attend(device, parts, q);
  const auto split = static_cast<std::ptrdiff_t>(3 * a.q_size());
  const auto of_a = attend(device, {parts[0]}, {q.begin(), q.begin() + split});
  const auto of_b = attend(device, {parts[1]}, {q.begin() + split, q.end()});
  CHECK(same_bits(of_a.data(), together.data(), of_a.size()));
  CHECK(same_bits(of_b.data(), together.data() + split, of_b.size()));
  return together;
}

// A key or value that is not finite makes its readers so; a silent 0 would hide the damage.
inline void check_not_finite(Device& device, const std::vector<float>& bad_ones) {
  for (const DType dtype : device.cache_types(32)) {
    const int dim = head_of(dtype, 16);
    for (const int at : {0, 7, 70}) {
      for (const float bad_one : bad_ones) {
        Random random(5);
        FilledCache cache(device, {2, 1, dim}, 80, dtype, random);
        const auto q = random.floats(cache.q_size(), -1, 1);
        const std::vector<float> plain(static_cast<std::size_t>(dim), 0.5f);
        std::vector<float> bad = plain;
        bad[3] = bad_one;
        const std::string where = place(device, cache.heads, dtype);
        cache.write(device, at, bad, plain);
        CHECK_IN(where + ", key", std::isnan(attend(device, {{&cache, {80}}}, q)[0]));
        cache.write(device, at, plain, bad);
        const auto by_value = attend(device, {{&cache, {80}}}, q);
        CHECK_IN(where + ", value", !std::isfinite(by_value[3]));
        CHECK_IN(where + ", value", std::isnan(by_value[3]) || !std::isnan(bad_one));
        CHECK(values_per_block(dtype) > 1 || std::isfinite(by_value[2]));
      }
    }
  }
}

// Heads [rows][n_heads][dim], normed and turned.
inline std::vector<double> rotated(const std::vector<float>& x, int n_heads, const float* norm,
                                   const std::vector<int>& positions,
                                   const std::vector<float>& frequencies, bool interleaved) {
  const std::size_t pairs = frequencies.size(), dim = 2 * pairs;
  std::vector<double> result, head(dim);
  for (std::size_t at = 0; at < x.size(); at += dim) {
    const std::size_t row = at / (static_cast<std::size_t>(n_heads) * dim);
    double squares = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      head[d] = x[at + d];
      squares += head[d] * head[d];
    }
    if (norm != nullptr) {
      for (std::size_t d = 0; d < dim; ++d) {
        head[d] *= norm[d] / std::sqrt(squares / static_cast<double>(dim) + 1e-6);
      }
    }
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle = positions[row] * static_cast<double>(frequencies[i]);
      double& a = head[interleaved ? 2 * i : i];
      double& b = head[interleaved ? 2 * i + 1 : i + pairs];
      const double before = a;
      a = a * std::cos(angle) - b * std::sin(angle);
      b = before * std::sin(angle) + b * std::cos(angle);
    }
    result.insert(result.end(), head.begin(), head.end());
  }
  return result;
}

// Norm of each head, then RoPE by the row's position, then the queries' scale; keys and values are
// read from the cache's memory.
inline void check_rotate_and_cache(Device& device, DType dtype, bool interleaved, bool normed) {
  const int dim = head_of(dtype, 24);
  const HeadShape heads{6, 2, dim};
  const auto head = static_cast<std::size_t>(dim);
  Random random(7);
  const auto q = random.floats(3 * 6 * head, -2, 2), k = random.floats(3 * 2 * head, -2, 2),
             v = random.floats(3 * 2 * head, -2, 2), norm = random.floats(2 * head, 0.5, 2);
  std::vector<float> frequencies;
  for (int i = 0; i < dim / 2; ++i) {
    frequencies.push_back(static_cast<float>(std::pow(100.0, -2.0 * i / dim)));
  }
  const std::vector<int> positions = {17, 18, 31};
  const std::vector<float> scales = {1.0f, 2.0f, 0.5f};
  const std::vector<TokenId> tokens(3);
  Backend& backend = device.backend();
  const auto kv = backend.allocate_kv(2, heads, 50, dtype);
  const SequenceRows sequence{kv.get(), 0, 3};
  const Buffer qb = backend.upload(q), kb = backend.upload(k), vb = backend.upload(v),
               nb = backend.upload(norm);
  backend.begin({tokens, positions, positions, {&sequence, 1}, scales}, frequencies, interleaved);
  backend.rotate_and_cache(1, heads, normed ? nb.get() : nullptr, normed ? nb.get() + dim : nullptr,
                           1e-6f, qb.get(), kb.get(), vb.get());
  const auto of = [&](const std::vector<float>& x, int n_heads, const float* weight) {
    return rotated(x, n_heads, normed ? weight : nullptr, positions, frequencies, interleaved);
  };
  const std::string where = place(device, heads, dtype);
  // An angle near 31 is off by half a unit in its last place.
  const double tolerance = 8 * (31 + 20) * kEps;
  auto expected = of(q, 6, norm.data());
  std::vector<double> tolerances;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double scale = scales[i / (6 * head)];
    expected[i] *= scale;
    tolerances.push_back(tolerance * scale);
  }
  CHECK_CLOSE(where, device.download(qb.get(), q.size()), expected, tolerances);
  const auto keys = of(k, 2, norm.data() + dim), values = rounded_to(dtype, v);
  for (int row = 0; row < 3; ++row) {
    for (int kv_head = 0; kv_head < 2; ++kv_head) {
      const std::size_t first = static_cast<std::size_t>(row * 2 + kv_head) * head;
      double top = 0;
      for (std::size_t i = first; i < first + head; ++i) top = std::max(top, std::abs(keys[i]));
      for (int d = 0; d < dim; ++d) {
        const std::size_t at = first + static_cast<std::size_t>(d);
        const int position = positions[static_cast<std::size_t>(row)];
        const auto stored = [&](bool value) {
          return device.stored(*kv, heads, 1, value, kv_head, position, d);
        };
        const double size = values_per_block(dtype) > 1 ? top : std::abs(keys[at]);
        CHECK_NEAR(stored(false), keys[at], tolerance + size * rounding(dtype));
        CHECK_EQ(stored(true), values[at]);
      }
    }
  }
}

}  // namespace sbd::test
