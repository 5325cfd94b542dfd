// 16 lanes in plain C++: the reference that every CPU runs. Included by kernel units only, which
// name SBD_ISA.
#pragma once

#include <cstdint>

namespace sbd::cpu::SBD_ISA {

struct F {
  float v[16];
};
struct I {
  std::int32_t v[16];
};
struct W {  // 64 bytes of packed weights, 4 for each lane
  std::uint8_t v[64];
};

constexpr int kStrips = 1;
constexpr int kRowTile = 2;
constexpr int kFewPasses = 3;  // that share pieces of a panel in L1 (linear_inl.h)
// Queries and vectors of keys or values an attention tile holds in registers.
constexpr int kQueryTile = 2;
constexpr int kVectorTile = 1;

template <typename To, typename From>
static inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Op>
static inline F lanes(Op op) {
  F r;
  for (int i = 0; i < 16; ++i) r.v[i] = op(i);
  return r;
}

static inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits<float>(sign | ((magnitude << 13) + (112u << 23)));
  return bits<float>(sign | bits<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
}
// To nearest, ties to even; beyond the range: infinity.
static inline std::uint16_t float_to_half(float x) {
  const std::uint32_t u = bits<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>(u >> 16 & 0x8000u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the FPU round at 2^-24
    const std::uint32_t rounded = bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<std::uint16_t>(sign | rounded);
  }
  const std::uint32_t odd = magnitude >> 13 & 1u;
  return static_cast<std::uint16_t>(sign | (magnitude - (112u << 23) + 0xfffu + odd) >> 13);
}
// To nearest, ties to even, for |x| < 2^22: at 2^23 the FPU rounds to whole numbers, and their low
// bits are those of an int. Unlike a cast, this is defined for NaN too.
static inline float round_to_int(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
static inline std::uint32_t low_bits_of_int(float x) { return bits<std::uint32_t>(x + 0x1.8p23f); }

static inline F zero() {
  return lanes([](int) { return 0.0f; });
}
static inline F set1(float x) {
  return lanes([&](int) { return x; });
}
static inline F load(const float* p) {
  return lanes([&](int i) { return p[i]; });
}
static inline void store(float* p, const F& a) { __builtin_memcpy(p, a.v, sizeof(a.v)); }
static inline F load_half(const std::uint16_t* p) {
  return lanes([&](int i) { return half_to_float(p[i]); });
}
static inline F load_bf16(const std::uint16_t* p) {
  return lanes([&](int i) { return bits<float>(std::uint32_t{p[i]} << 16); });
}
static inline F load_signed_bytes(const std::uint8_t* p) {
  return lanes([&](int i) { return static_cast<float>(static_cast<std::int8_t>(p[i])); });
}
static inline void store_half(std::uint16_t* p, const F& a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}
static inline F add(const F& a, const F& b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
static inline F sub(const F& a, const F& b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
static inline F mul(const F& a, const F& b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
static inline F div(const F& a, const F& b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
static inline F max(const F& a, const F& b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F min(const F& a, const F& b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F abs(const F& a) {
  return lanes([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; });
}
// Unfused: without an FMA unit a fused one would be a library call.
static inline F fma(const F& a, const F& b, const F& c) {
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline F round(const F& a) {
  return lanes([&](int i) { return round_to_int(a.v[i]); });
}
// 0 where x < limit, else value
static inline F zero_below(const F& value, const F& x, const F& limit) {
  return lanes([&](int i) { return x.v[i] < limit.v[i] ? 0.0f : value.v[i]; });
}
// a * 2^n for integral n with a normal result
static inline F scale_by_power(const F& a, const F& n) {
  return lanes([&](int i) {
    return bits<float>(bits<std::uint32_t>(a.v[i]) + (low_bits_of_int(n.v[i]) << 23));
  });
}
// bit i: a[i] == b[i]
static inline std::uint32_t equal_mask(const F& a, const F& b) {
  std::uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<std::uint32_t>(a.v[i] == b.v[i]) << i;
  return mask;
}
// The first n lanes of a, the others of b.
static inline F first_lanes(const F& a, int n, const F& b) {
  return lanes([&](int i) { return i < n ? a.v[i] : b.v[i]; });
}
// The upper lanes are added to the lower ones, down to one.
static inline float reduce_add(F x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  }
  return x.v[0];
}
static inline float reduce_max(const F& x) {
  float m = x.v[0];
  for (int i = 1; i < 16; ++i) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
// Of 32 neighbours, those at even and at odd places; and back.
static inline void unzip(F low, F high, F* even, F* odd) {
  for (int i = 0; i < 8; ++i) {
    even->v[i] = low.v[2 * i];
    odd->v[i] = low.v[2 * i + 1];
    even->v[i + 8] = high.v[2 * i];
    odd->v[i + 8] = high.v[2 * i + 1];
  }
}
static inline void zip(F even, F odd, F* low, F* high) {
  for (int i = 0; i < 8; ++i) {
    low->v[2 * i] = even.v[i];
    low->v[2 * i + 1] = odd.v[i];
    high->v[2 * i] = even.v[i + 8];
    high->v[2 * i + 1] = odd.v[i + 8];
  }
}

static inline I set1_int(std::int32_t x) {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
static inline F to_float(const I& a) {
  return lanes([&](int i) { return static_cast<float>(a.v[i]); });
}
// Rounded to nearest; the kernels pass values within int8.
static inline void store_int8(std::int8_t* p, const F& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(low_bits_of_int(a.v[i]));
}

static inline W load_weights(const std::uint8_t* p) {
  W w;
  __builtin_memcpy(w.v, p, sizeof(w.v));
  return w;
}
template <int kMask>
static inline W masked(W w) {  // every byte
  for (auto& b : w.v) b &= kMask;
  return w;
}
template <int kMask>
static inline W with_bits(W w, const W& more) {  // w | masked(more)
  for (int i = 0; i < 64; ++i) w.v[i] = static_cast<std::uint8_t>(w.v[i] | (more.v[i] & kMask));
  return w;
}
// Bytes shifted; what bits come in from outside is not said.
template <int kBits>
static inline W shift_left(W w) {
  for (auto& b : w.v) b = static_cast<std::uint8_t>(b << kBits);
  return w;
}
template <int kBits>
static inline W shift_right(W w) {
  for (auto& b : w.v) b = static_cast<std::uint8_t>(b >> kBits);
  return w;
}
// Bytes below 16 as places of a table of 16.
static inline W lookup(const std::uint8_t* table, W w) {
  for (auto& b : w.v) b = table[b];
  return w;
}
// The top two bits of a, b and c, a's lowest.
static inline W top_bits(W a, const W& b, const W& c) {
  for (int i = 0; i < 64; ++i) {
    a.v[i] = static_cast<std::uint8_t>(a.v[i] >> 6 | b.v[i] >> 6 << 2 | c.v[i] >> 6 << 4);
  }
  return a;
}
static inline W high_nibbles(const W& w) { return shift_right<4>(w); }
// sum += unsigned weight bytes times signed activation bytes, four products a lane
static inline I dot_bytes(I sum, const W& w, const I& x) {
  for (int i = 0; i < 16; ++i) {
    const auto u = static_cast<std::uint32_t>(x.v[i]);
    for (int j = 0; j < 4; ++j) {
      sum.v[i] += w.v[4 * i + j] * static_cast<std::int8_t>(u >> (8 * j));
    }
  }
  return sum;
}
// The same for q8_0 weights, stored as value + 128
constexpr int kQ8Offset = 128;
static inline const W& q8_weights(const W& w) { return w; }
static inline I dot_q8(const I& sum, const W& w, const I& x) { return dot_bytes(sum, w, x); }
// sum += two bf16 weights times two bf16 activations a lane
static inline F dot_bf16(F sum, const W& w, const I& x) {
  for (int i = 0; i < 16; ++i) {
    std::uint32_t pair;
    __builtin_memcpy(&pair, w.v + 4 * i, 4);
    const auto u = static_cast<std::uint32_t>(x.v[i]);
    sum.v[i] += bits<float>(pair << 16) * bits<float>(u << 16);
    sum.v[i] += bits<float>(pair & 0xffff0000u) * bits<float>(u & 0xffff0000u);
  }
  return sum;
}

// The compiler forgets what it knows of a value.
static inline void hide(W& w) { asm volatile("" : : "r"(&w) : "memory"); }
static inline void hide(F& x) { asm volatile("" : : "r"(&x) : "memory"); }

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace sbd::cpu::SBD_ISA
