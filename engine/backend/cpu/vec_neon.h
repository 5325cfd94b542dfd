// 16 lanes in four NEON registers, for CPUs with dot products of bytes. Included by kernel units
// only, which name SBD_ISA.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace sbd::cpu::SBD_ISA {

struct F {  // 16 floats
  float32x4_t a, b, c, d;
};
struct I {  // 16 int32
  int32x4_t a, b, c, d;
};
struct W {  // 64 bytes of packed weights, 4 for each lane
  uint8x16_t a, b, c, d;
};

// Of 32 registers, the products of a strip and 4 rows take 16 and its weights 4. A quantised group
// has 16 float sums besides: some wait in memory, as they are needed once in its 8 steps.
constexpr int kStrips = 1;
constexpr int kRowTile = 4;
constexpr int kFewPasses = 3;  // that share pieces of a panel in L1 (linear_inl.h)
// Queries and vectors of keys or values an attention tile holds in registers: 24 sums, 4 of keys.
constexpr int kQueryTile = 6;
constexpr int kVectorTile = 1;

// The operation on the registers of each place.
template <typename Result, typename Op, typename... Vectors>
static inline Result each(Op op, Vectors... v) {
  return {op(v.a...), op(v.b...), op(v.c...), op(v.d...)};
}

// To gcc 12 the intrinsics of these three may change any memory (they raise floating-point flags),
// and a matmul's sums would be stored and loaded again around each.
static inline float32x4_t fma_quad(float32x4_t sum, float32x4_t x, float32x4_t y) {
  asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(x), "w"(y));
  return sum;
}
static inline float32x4_t widen_low(uint16x8_t halves) {
  float32x4_t x;
  asm("fcvtl %0.4s, %1.4h" : "=w"(x) : "w"(halves));
  return x;
}
static inline float32x4_t widen_high(uint16x8_t halves) {
  float32x4_t x;
  asm("fcvtl2 %0.4s, %1.8h" : "=w"(x) : "w"(halves));
  return x;
}

static inline F zero() {
  const float32x4_t a = vdupq_n_f32(0.0f);
  return {a, a, a, a};
}
static inline F set1(float x) {
  const float32x4_t a = vdupq_n_f32(x);
  return {a, a, a, a};
}
static inline F load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
static inline void store(float* p, F x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
static inline F load_half(const std::uint16_t* p) {
  const uint16x8_t low = vld1q_u16(p);
  const uint16x8_t high = vld1q_u16(p + 8);
  return {widen_low(low), widen_high(low), widen_low(high), widen_high(high)};
}
static inline F load_bf16(const std::uint16_t* p) {
  const auto quarter = [&](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + i * 4), 16));
  };
  return {quarter(0), quarter(1), quarter(2), quarter(3)};
}
static inline F load_signed_bytes(const std::uint8_t* p) {
  const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
  const int16x8_t high = vmovl_high_s8(bytes);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
static inline void store_half(std::uint16_t* p, F x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
  vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
static inline F add(F x, F y) {
  return each<F>([](auto p, auto q) { return vaddq_f32(p, q); }, x, y);
}
static inline F sub(F x, F y) {
  return each<F>([](auto p, auto q) { return vsubq_f32(p, q); }, x, y);
}
static inline F mul(F x, F y) {
  return each<F>([](auto p, auto q) { return vmulq_f32(p, q); }, x, y);
}
static inline F div(F x, F y) {
  return each<F>([](auto p, auto q) { return vdivq_f32(p, q); }, x, y);
}
// NaN where either is: these pass over no damage, which x86's may where it is the first operand.
static inline F max(F x, F y) {
  return each<F>([](auto p, auto q) { return vmaxq_f32(p, q); }, x, y);
}
static inline F min(F x, F y) {
  return each<F>([](auto p, auto q) { return vminq_f32(p, q); }, x, y);
}
static inline F abs(F x) {
  return each<F>([](auto p) { return vabsq_f32(p); }, x);
}
static inline F fma(F x, F y, F z) {  // x * y + z
  return each<F>([](auto p, auto q, auto sum) { return fma_quad(sum, p, q); }, x, y, z);
}
static inline F round(F x) {
  return each<F>([](auto p) { return vrndnq_f32(p); }, x);
}
// 0 where x < limit, else value
static inline F zero_below(F value, F x, F limit) {
  const auto pick = [](auto v, auto p, auto q) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(p, q)));
  };
  return each<F>(pick, value, x, limit);
}
// x * 2^n for integral n with a normal result
static inline F scale_by_power(F x, F n) {
  const auto scale = [](auto v, auto power) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(power), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), exponent));
  };
  return each<F>(scale, x, n);
}
// bit i: x[i] == y[i]
static inline std::uint32_t equal_mask(F x, F y) {
  const auto narrow = [](auto low, auto high) {
    return vcombine_u16(vmovn_u32(low), vmovn_u32(high));
  };
  const uint8x8_t bits = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t low = narrow(vceqq_f32(x.a, y.a), vceqq_f32(x.b, y.b));
  const uint16x8_t high = narrow(vceqq_f32(x.c, y.c), vceqq_f32(x.d, y.d));
  const std::uint32_t low_bits = vaddv_u8(vand_u8(vmovn_u16(low), bits));
  const std::uint32_t high_bits = vaddv_u8(vand_u8(vmovn_u16(high), bits));
  return low_bits | high_bits << 8;
}
// The first n lanes of x, the others of y.
static inline F first_lanes(F x, int n, F y) {
  const int32x4_t lanes = {0, 1, 2, 3};
  const auto pick = [&](int first, auto p, auto q) {
    return vbslq_f32(vcgtq_s32(vdupq_n_s32(n - first), lanes), p, q);
  };
  return {pick(0, x.a, y.a), pick(4, x.b, y.b), pick(8, x.c, y.c), pick(12, x.d, y.d)};
}
// The upper lanes are added to the lower ones, down to one.
static inline float reduce_add(F x) {
  const float32x4_t a = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
  return vpadds_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a)));
}
static inline float reduce_max(F x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d)));
}
// Of 32 neighbours, those at even and at odd places; and back.
static inline void unzip(F low, F high, F* even, F* odd) {
  *even = {vuzp1q_f32(low.a, low.b), vuzp1q_f32(low.c, low.d), vuzp1q_f32(high.a, high.b),
           vuzp1q_f32(high.c, high.d)};
  *odd = {vuzp2q_f32(low.a, low.b), vuzp2q_f32(low.c, low.d), vuzp2q_f32(high.a, high.b),
          vuzp2q_f32(high.c, high.d)};
}
static inline void zip(F even, F odd, F* low, F* high) {
  *low = {vzip1q_f32(even.a, odd.a), vzip2q_f32(even.a, odd.a), vzip1q_f32(even.b, odd.b),
          vzip2q_f32(even.b, odd.b)};
  *high = {vzip1q_f32(even.c, odd.c), vzip2q_f32(even.c, odd.c), vzip1q_f32(even.d, odd.d),
           vzip2q_f32(even.d, odd.d)};
}

static inline I set1_int(std::int32_t x) {
  const int32x4_t a = vdupq_n_s32(x);
  return {a, a, a, a};
}
static inline F to_float(I x) {
  return each<F>([](auto p) { return vcvtq_f32_s32(p); }, x);
}
// Rounded to nearest, saturated to int8.
static inline void store_int8(std::int8_t* p, F x) {
  const auto narrow = [](auto low, auto high) {
    const int16x4_t first = vqmovn_s32(vcvtnq_s32_f32(low));
    return vqmovn_s16(vqmovn_high_s32(first, vcvtnq_s32_f32(high)));
  };
  vst1q_s8(p, vcombine_s8(narrow(x.a, x.b), narrow(x.c, x.d)));
}

static inline W load_weights(const std::uint8_t* p) {
  return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
template <int kMask>
static inline W masked(W w) {  // every byte
  return each<W>([](auto v) { return vandq_u8(v, vdupq_n_u8(kMask)); }, w);
}
template <int kMask>
static inline W with_bits(W w, W more) {  // w | masked(more)
  return each<W>([](auto v, auto m) { return vorrq_u8(v, vandq_u8(m, vdupq_n_u8(kMask))); }, w,
                 more);
}
// Bytes shifted; what bits come in from outside is not said.
template <int kBits>
static inline W shift_left(W w) {
  return each<W>([](auto v) { return vshlq_n_u8(v, kBits); }, w);
}
template <int kBits>
static inline W shift_right(W w) {
  return each<W>([](auto v) { return vshrq_n_u8(v, kBits); }, w);
}
// Bytes below 16 as places of a table of 16.
static inline W lookup(const std::uint8_t* table, W w) {
  const uint8x16_t t = vld1q_u8(table);
  return each<W>([t](auto v) { return vqtbl1q_u8(t, v); }, w);
}
// The top two bits of a, b and c, a's lowest.
static inline W top_bits(W a, W b, W c) {
  const auto pack = [](auto p, auto q, auto r) {  // q inserted below r's top two bits, then p
    return vshrq_n_u8(vsriq_n_u8(vsriq_n_u8(r, q, 2), p, 4), 2);
  };
  return each<W>(pack, a, b, c);
}
static inline W high_nibbles(W w) { return shift_right<4>(w); }
// sum += unsigned weight bytes, 127 at most, times signed activation bytes, four products a lane
static inline I dot_bytes(I sum, W w, I x) {
  const auto dot = [](auto s, auto p, auto q) {
    return vdotq_s32(s, vreinterpretq_s8_u8(p), vreinterpretq_s8_s32(q));
  };
  return each<I>(dot, sum, w, x);
}
// The same for q8_0 weights, stored as value + 128: made signed here
constexpr int kQ8Offset = 0;
static inline W q8_weights(W w) {
  return each<W>([](auto v) { return veorq_u8(v, vdupq_n_u8(128)); }, w);
}
static inline I dot_q8(I sum, W w, I x) { return dot_bytes(sum, w, x); }

// sum += two bf16 weights times two bf16 activations a lane
static inline F dot_bf16(F sum, W w, I x) {
  const auto low = [](uint32x4_t u) { return vreinterpretq_f32_u32(vshlq_n_u32(u, 16)); };
  const auto high = [](uint32x4_t u) {
    return vreinterpretq_f32_u32(vandq_u32(u, vdupq_n_u32(0xffff0000u)));
  };
  const auto dot = [&](auto s, auto p, auto q) {
    const uint32x4_t pairs = vreinterpretq_u32_u8(p);
    const uint32x4_t values = vreinterpretq_u32_s32(q);
    return fma_quad(fma_quad(s, low(pairs), low(values)), high(pairs), high(values));
  };
  return each<F>(dot, sum, w, x);
}

// The compiler forgets what it knows of a value.
static inline void hide(W& w) { asm volatile("" : "+w"(w.a), "+w"(w.b), "+w"(w.c), "+w"(w.d)); }
static inline void hide(F& x) { asm volatile("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d)); }

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace sbd::cpu::SBD_ISA
