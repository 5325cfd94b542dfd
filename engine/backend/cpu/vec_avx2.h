// 16 lanes in two AVX2 registers. Included by kernel units only, which name SBD_ISA.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sbd::cpu::SBD_ISA {

struct F {  // 16 floats
  __m256 a, b;
};
struct I {  // 16 int32
  __m256i a, b;
};
struct W {  // 64 bytes of packed weights, 4 for each lane
  __m256i a, b;
};

// 16 registers carry 2 x 3 integer and 2 x 3 float accumulators of a strip.
constexpr int kStrips = 1;
constexpr int kRowTile = 3;
constexpr int kFewPasses = 3;  // that share pieces of a panel in L1 (linear_inl.h)
// Queries and vectors of keys or values an attention tile holds in registers.
constexpr int kQueryTile = 6;
constexpr int kVectorTile = 1;

static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline F load_half(const std::uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
static inline __m256 load_eight_bf16(const std::uint16_t* p) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
static inline F load_bf16(const std::uint16_t* p) {
  return {load_eight_bf16(p), load_eight_bf16(p + 8)};
}
static inline F load_signed_bytes(const std::uint8_t* p) {
  const auto eight = [](const std::uint8_t* q) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  };
  return {eight(p), eight(p + 8)};
}
static inline void store_half(std::uint16_t* p, F x) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline F fma(F x, F y, F z) {  // x * y + z
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline F round(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
// 0 where x < limit, else value
static inline F zero_below(F value, F x, F limit) {
  return {_mm256_and_ps(value.a, _mm256_cmp_ps(x.a, limit.a, _CMP_NLT_UQ)),
          _mm256_and_ps(value.b, _mm256_cmp_ps(x.b, limit.b, _CMP_NLT_UQ))};
}
// x * 2^n for integral n with a normal result
static inline F scale_by_power(F x, F n) {
  const __m256i a = _mm256_slli_epi32(_mm256_cvtps_epi32(n.a), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_cvtps_epi32(n.b), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.a), a)),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.b), b))};
}
// bit i: x[i] == y[i]
static inline std::uint32_t equal_mask(F x, F y) {
  const auto a =
      static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ)));
  const auto b =
      static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)));
  return a | b << 8;
}
// The first n lanes of x, the others of y.
static inline F first_lanes(F x, int n, F y) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i a = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
  const __m256i b = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes);
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(a)),
          _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(b))};
}
// The upper lanes are added to the lower ones, down to one.
static inline float reduce_add(F x) {
  const __m256 a = _mm256_add_ps(x.a, x.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline float reduce_max(F x) {
  const __m256 a = _mm256_max_ps(x.a, x.b);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
// Of 32 neighbours, those at even and at odd places; and back.
static inline void unzip(F low, F high, F* even, F* odd) {
  const auto picked = [](__m256 x, __m256 y, auto pick) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pick(x, y)), 0xd8));
  };
  const auto even_places = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0x88); };
  const auto odd_places = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, 0xdd); };
  *even = {picked(low.a, low.b, even_places), picked(high.a, high.b, even_places)};
  *odd = {picked(low.a, low.b, odd_places), picked(high.a, high.b, odd_places)};
}
static inline void zip_eight(__m256 even, __m256 odd, F* out) {
  const __m256 a = _mm256_unpacklo_ps(even, odd);
  const __m256 b = _mm256_unpackhi_ps(even, odd);
  *out = {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}
static inline void zip(F even, F odd, F* low, F* high) {
  zip_eight(even.a, odd.a, low);
  zip_eight(even.b, odd.b, high);
}

static inline I set1_int(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// Rounded to nearest, saturated to int8.
static inline void store_int8(std::int8_t* p, F x) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

static inline W load_weights(const std::uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
template <int kMask>
static inline W masked(W w) {  // every byte
  const __m256i mask = _mm256_set1_epi8(kMask);
  return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
template <int kMask>
static inline W with_bits(W w, W more) {  // w | masked(more)
  const W bits = masked<kMask>(more);
  return {_mm256_or_si256(w.a, bits.a), _mm256_or_si256(w.b, bits.b)};
}
// Bytes shifted; what bits come in from outside is not said.
template <int kBits>
static inline W shift_left(W w) {
  return {_mm256_slli_epi16(w.a, kBits), _mm256_slli_epi16(w.b, kBits)};
}
template <int kBits>
static inline W shift_right(W w) {
  return {_mm256_srli_epi16(w.a, kBits), _mm256_srli_epi16(w.b, kBits)};
}
// Bytes below 16 as places of a table of 16.
static inline W lookup(const std::uint8_t* table, W w) {
  const __m256i t =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, w.a), _mm256_shuffle_epi8(t, w.b)};
}
// The top two bits of a, b and c, a's lowest.
static inline __m256i top_bits_of_eight(__m256i a, __m256i b, __m256i c) {
  a = _mm256_and_si256(_mm256_srli_epi16(a, 6), _mm256_set1_epi8(3));
  b = _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(12));
  c = _mm256_and_si256(_mm256_srli_epi16(c, 2), _mm256_set1_epi8(48));
  return _mm256_or_si256(_mm256_or_si256(a, b), c);
}
static inline W top_bits(W a, W b, W c) {
  return {top_bits_of_eight(a.a, b.a, c.a), top_bits_of_eight(a.b, b.b, c.b)};
}
static inline W high_nibbles(W w) { return masked<15>(shift_right<4>(w)); }
#ifdef __AVXVNNI__
// sum += unsigned weight bytes times signed activation bytes, four products a lane
static inline I dot_bytes(I sum, W w, I x) {
  return {_mm256_dpbusd_avx_epi32(sum.a, w.a, x.a), _mm256_dpbusd_avx_epi32(sum.b, w.b, x.b)};
}
// The same for q8_0 weights, stored as value + 128
constexpr int kQ8Offset = 128;
static inline W q8_weights(W w) { return w; }
static inline I dot_q8(I sum, W w, I x) { return dot_bytes(sum, w, x); }
#else
static inline __m256i dot_eight(__m256i sum, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);  // saturates at 32767
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// sum += unsigned weight bytes, 128 at most, times signed activation bytes, four products a lane
static inline I dot_bytes(I sum, W w, I x) {
  return {dot_eight(sum.a, w.a, x.a), dot_eight(sum.b, w.b, x.b)};
}
// The same for q8_0 weights, stored as value + 128: made signed here, and multiplied by their
// magnitudes with the activations under their signs.
constexpr int kQ8Offset = 0;
static inline W q8_weights(W w) {
  const __m256i offset = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(w.a, offset), _mm256_xor_si256(w.b, offset)};
}
static inline I dot_q8(I sum, W w, I x) {
  return dot_bytes(sum, {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)},
                   {_mm256_sign_epi8(x.a, w.a), _mm256_sign_epi8(x.b, w.b)});
}
#endif

// sum += two bf16 weights times two bf16 activations a lane
static inline __m256 dot_eight_bf16(__m256 sum, __m256i w, __m256i x) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
                        _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), sum);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)),
                         _mm256_castsi256_ps(_mm256_and_si256(x, high)), sum);
}
static inline F dot_bf16(F sum, W w, I x) {
  return {dot_eight_bf16(sum.a, w.a, x.a), dot_eight_bf16(sum.b, w.b, x.b)};
}

// The compiler forgets what it knows of a value.
static inline void hide(W& w) { asm volatile("" : "+x"(w.a), "+x"(w.b)); }
static inline void hide(F& x) { asm volatile("" : "+x"(x.a), "+x"(x.b)); }

static inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace sbd::cpu::SBD_ISA
