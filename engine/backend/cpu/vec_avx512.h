// 16 lanes in one AVX-512 register. Included by kernel units only, which name SBD_ISA.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sbd::cpu::SBD_ISA {

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using W = __m512i;  // 64 bytes of packed weights, 4 for each lane

// Halves of a panel and activation rows a matmul tile holds in registers: 32 registers carry
// 2 x 6 integer and 2 x 6 float accumulators.
constexpr int kHalves = 2;
constexpr int kRowTile = 6;

static inline F zero() { return _mm512_setzero_ps(); }
static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
static inline F load_half(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline F load_bytes(const std::uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
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
// a * 2^n for integral n with a normal result
static inline F scale_by_power(F a, F n) {
  const I shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), shift));
}
// bit i: a[i] == b[i]
static inline std::uint32_t equal_mask(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

static inline I set1_int(std::int32_t x) { return _mm512_set1_epi32(x); }
static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
// Rounded to nearest, saturated to int8.
static inline void store_int8(std::int8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}

static inline W load_weights(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
static inline W low_sixes(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(63)); }
// The top two bits of a, b and c, a's lowest.
static inline W top_bits(W a, W b, W c) {
  constexpr int or_and = 0xf8;  // x | (y & z)
  W w = _mm512_and_si512(_mm512_srli_epi16(a, 6), _mm512_set1_epi8(3));
  w = _mm512_ternarylogic_epi64(w, _mm512_srli_epi16(b, 4), _mm512_set1_epi8(12), or_and);
  return _mm512_ternarylogic_epi64(w, _mm512_srli_epi16(c, 2), _mm512_set1_epi8(48), or_and);
}
static inline W low_nibbles(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline W high_nibbles(W w) {
  return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
}
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

static inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace sbd::cpu::SBD_ISA
