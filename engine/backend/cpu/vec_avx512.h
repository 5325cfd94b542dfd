// 16 lanes in one AVX-512 register. Included by kernel units only, which name SBD_ISA.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sbd::cpu::SBD_ISA {

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using W = __m512i;  // 64 bytes of packed weights, 4 for each lane

// Strips of a panel and activation rows a matmul tile holds in registers: 32 registers carry
// 2 x 6 integer and 2 x 6 float accumulators.
constexpr int kStrips = 2;
constexpr int kRowTile = 6;
constexpr int kFewPasses = 2;  // that share pieces of a panel in L1 (linear_inl.h)
// Queries and vectors of keys or values an attention tile holds in registers.
constexpr int kQueryTile = 4;
constexpr int kVectorTile = 4;

static inline F zero() { return _mm512_setzero_ps(); }
static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
static inline F load_half(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline F load_bf16(const std::uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
static inline F load_signed_bytes(const std::uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
static inline void store_half(std::uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F abs(F a) { return _mm512_abs_ps(a); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
static inline F round(F a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 0 where x < limit, else value
static inline F zero_below(F value, F x, F limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), value);
}
// a * 2^n for integral n
static inline F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }
// bit i: a[i] == b[i]
static inline std::uint32_t equal_mask(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// The first n lanes of a, the others of b.
static inline F first_lanes(F a, int n, F b) {
  const unsigned mask = n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u;
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(mask), a);
}
// The upper lanes are added to the lower ones, down to one.
static inline float reduce_add(F x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline float reduce_max(F x) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
// Of 32 neighbours, those at even and at odd places; and back.
static inline void unzip(F low, F high, F* even, F* odd) {
  const I at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(low, at, high);
  *odd = _mm512_permutex2var_ps(low, _mm512_or_si512(at, _mm512_set1_epi32(1)), high);
}
static inline void zip(F even, F odd, F* low, F* high) {
  const I at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *low = _mm512_permutex2var_ps(even, at, odd);
  *high = _mm512_permutex2var_ps(even, _mm512_add_epi32(at, _mm512_set1_epi32(8)), odd);
}

static inline I set1_int(std::int32_t x) { return _mm512_set1_epi32(x); }
static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
// Rounded to nearest, saturated to int8.
static inline void store_int8(std::int8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}

static inline W load_weights(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
template <int kMask>
static inline W masked(W w) {  // every byte
  return _mm512_and_si512(w, _mm512_set1_epi8(kMask));
}
template <int kMask>
static inline W with_bits(W w, W more) {  // w | masked(more)
  constexpr int or_and = 0xf8;            // x | (y & z)
  return _mm512_ternarylogic_epi64(w, more, _mm512_set1_epi8(kMask), or_and);
}
// Bytes shifted; what bits come in from outside is not said.
template <int kBits>
static inline W shift_left(W w) {
  return _mm512_slli_epi16(w, kBits);
}
template <int kBits>
static inline W shift_right(W w) {
  return _mm512_srli_epi16(w, kBits);
}
// Bytes below 16 as places of a table of 16.
static inline W lookup(const std::uint8_t* table, W w) {
  const __m128i t = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), w);
}
// The top two bits of a, b and c, a's lowest.
static inline W top_bits(W a, W b, W c) {
  const W w = with_bits<12>(masked<3>(shift_right<6>(a)), shift_right<4>(b));
  return with_bits<48>(w, shift_right<2>(c));
}
static inline W high_nibbles(W w) { return masked<15>(shift_right<4>(w)); }
// sum += unsigned weight bytes times signed activation bytes, four products a lane
static inline I dot_bytes(I sum, W w, I x) { return _mm512_dpbusd_epi32(sum, w, x); }
// The same for q8_0 weights, stored as value + 128
constexpr int kQ8Offset = 128;
static inline W q8_weights(W w) { return w; }
static inline I dot_q8(I sum, W w, I x) { return dot_bytes(sum, w, x); }

// sum += two bf16 weights times two bf16 activations a lane
static inline F dot_bf16(F sum, W w, I x) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else
  const I high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, high)),
                         _mm512_castsi512_ps(_mm512_and_si512(x, high)), sum);
#endif
}
#ifdef __AVX512BF16__
// 32 neighbours as bf16
static inline W pack_bf16(F low, F high) { return (W)_mm512_cvtne2ps_pbh(high, low); }
static inline void store_words(std::uint8_t* p, W w) { _mm512_storeu_si512(p, w); }
#endif

// The compiler forgets what it knows of a value.
static inline void hide(W& w) { asm volatile("" : "+v"(w)); }
static inline void hide(F& x) { asm volatile("" : "+v"(x)); }

// Into L1, and with it into L2: into L2 alone is 4 to 8 % slower.
static inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace sbd::cpu::SBD_ISA
