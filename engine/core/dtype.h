// Storage types of weights and of the KV cache, with GGUF's block layouts.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sbd {

enum class DType : std::uint8_t {
  f32,
  f16,
  bf16,
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  iq4_nl,  // blocks of kGroupSize weights
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_xs,  // blocks of kSuperGroupSize
};
inline constexpr DType kDTypes[] = {DType::f32,    DType::f16,  DType::bf16,  DType::q8_0,
                                    DType::q4_0,   DType::q4_1, DType::q5_0,  DType::q5_1,
                                    DType::iq4_nl, DType::q2_k, DType::q3_k,  DType::q4_k,
                                    DType::q5_k,   DType::q6_k, DType::iq4_xs};

inline constexpr int kGroupSize = 32;        // weights that share a scale in most types
inline constexpr int kSuperGroupSize = 256;  // weights of a block whose scales are quantised, too
inline constexpr int kSmallGroupSize = 16;   // weights that share a scale in Q2_K, Q3_K and Q6_K

struct BlockQ8_0 {      // w[i] = scale * quants[i]
  std::uint16_t scale;  // IEEE half
  std::int8_t quants[kGroupSize];
};
static_assert(sizeof(BlockQ8_0) == 34);

struct BlockQ4_0 {  // w[i] = scale * ((nibbles[i] & 15) - 8), w[i + 16] = scale * ((nibbles[i] >>
                    // 4) - 8)
  std::uint16_t scale;
  std::uint8_t nibbles[kGroupSize / 2];
};
static_assert(sizeof(BlockQ4_0) == 18);

struct BlockQ4_1 {  // w[i] = scale * (nibbles[i] & 15) + min, w[i + 16] = scale * (nibbles[i] >> 4)
                    // + min
  std::uint16_t scale;
  std::uint16_t min;
  std::uint8_t nibbles[kGroupSize / 2];
};
static_assert(sizeof(BlockQ4_1) == 20);

// As Q4_0 and Q4_1, with bit i of `highs` as bit 4 of quant i; Q5_0 subtracts 16.
struct BlockQ5_0 {
  std::uint16_t scale;
  std::uint8_t highs[kGroupSize / 8];
  std::uint8_t nibbles[kGroupSize / 2];
};
static_assert(sizeof(BlockQ5_0) == 22);

struct BlockQ5_1 {
  std::uint16_t scale;
  std::uint16_t min;
  std::uint8_t highs[kGroupSize / 8];
  std::uint8_t nibbles[kGroupSize / 2];
};
static_assert(sizeof(BlockQ5_1) == 24);

// As Q4_0, but a nibble is the number of a level (quant_blocks.h).
using BlockIQ4_NL = BlockQ4_0;

// Of 16 weights: w[i] = scale * (scales[i / 16] & 15) * q[i] - min * (scales[i / 16] >> 4). Of each
// 128 weights, those at i, i + 32, i + 64 and i + 96 share byte i of `twos`, the first the lowest.
struct BlockQ2_K {
  std::uint8_t scales[kSuperGroupSize / kSmallGroupSize];
  std::uint8_t twos[kSuperGroupSize / 4];
  std::uint16_t scale;  // IEEE half
  std::uint16_t min;
};
static_assert(sizeof(BlockQ2_K) == 84);

// Of 16 weights: w[i] = scale * (scales[i / 16] - 32) * (q[i] - 4). Two bits as in Q2_K; bit 2 of
// weight i is bit i / 32 of byte i % 32 of `highs`. Of a scale, four bits are a nibble of bytes
// 0-7, and two are in bytes 8-11, of which byte j has those of scales j, j + 4, j + 8 and j + 12.
struct BlockQ3_K {
  std::uint8_t highs[kSuperGroupSize / 8];
  std::uint8_t twos[kSuperGroupSize / 4];
  std::uint8_t six_bits[12];
  std::uint16_t scale;  // IEEE half
};
static_assert(sizeof(BlockQ3_K) == 110);

// Group g of 32: w[i] = scale * scales[g] * q[i] - min * mins[g]. Groups 2j and 2j + 1 are the low
// and the high nibbles of 32 bytes. The eight scales and mins have six bits each.
struct BlockQ4_K {
  std::uint16_t scale;  // IEEE half
  std::uint16_t min;
  std::uint8_t six_bits[12];
  std::uint8_t nibbles[kSuperGroupSize / 2];
};
static_assert(sizeof(BlockQ4_K) == 144);

struct BlockQ5_K {  // as Q4_K, with bit g of highs[i % 32] as bit 4
  std::uint16_t scale;
  std::uint16_t min;
  std::uint8_t six_bits[12];
  std::uint8_t highs[kSuperGroupSize / 8];
  std::uint8_t nibbles[kSuperGroupSize / 2];
};
static_assert(sizeof(BlockQ5_K) == 176);

// w[i] = scale * scales[i / 16] * (q[i] - 32). Of each 128 weights, those at i, i + 32, i + 64 and
// i + 96 share byte i of `highs` for their bits 4 and 5; bits 0 to 3 of the first two are the low,
// of the last two the high nibbles of bytes i and i + 32 of `lows`.
struct BlockQ6_K {
  std::uint8_t lows[kSuperGroupSize / 2];
  std::uint8_t highs[kSuperGroupSize / 4];
  std::int8_t scales[kSuperGroupSize / kSmallGroupSize];
  std::uint16_t scale;  // IEEE half
};
static_assert(sizeof(BlockQ6_K) == 210);

// Group g of 32: w[i] = scale * (scales[g] - 32) * level, its nibbles in 16 bytes as in IQ4_NL. A
// scale's low four bits are a nibble of scales_low, its high two lie in scales_high.
struct BlockIQ4_XS {
  std::uint16_t scale;  // IEEE half
  std::uint16_t scales_high;
  std::uint8_t scales_low[kSuperGroupSize / kGroupSize / 2];
  std::uint8_t nibbles[kSuperGroupSize / 2];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

// Values that are stored together: one for the float types, a group for the quantised ones.
constexpr int values_per_block(DType type) {
  switch (type) {
    case DType::f32:
    case DType::f16:
    case DType::bf16: return 1;
    case DType::q8_0:
    case DType::q4_0:
    case DType::q4_1:
    case DType::q5_0:
    case DType::q5_1:
    case DType::iq4_nl: return kGroupSize;
    case DType::q2_k:
    case DType::q3_k:
    case DType::q4_k:
    case DType::q5_k:
    case DType::q6_k:
    case DType::iq4_xs: return kSuperGroupSize;
  }
  return 1;
}

constexpr std::size_t bytes_per_block(DType type) {
  switch (type) {
    case DType::f32: return 4;
    case DType::f16: return 2;
    case DType::bf16: return 2;
    case DType::q8_0: return sizeof(BlockQ8_0);
    case DType::q4_0: return sizeof(BlockQ4_0);
    case DType::q4_1: return sizeof(BlockQ4_1);
    case DType::q5_0: return sizeof(BlockQ5_0);
    case DType::q5_1: return sizeof(BlockQ5_1);
    case DType::iq4_nl: return sizeof(BlockIQ4_NL);
    case DType::q2_k: return sizeof(BlockQ2_K);
    case DType::q3_k: return sizeof(BlockQ3_K);
    case DType::q4_k: return sizeof(BlockQ4_K);
    case DType::q5_k: return sizeof(BlockQ5_K);
    case DType::q6_k: return sizeof(BlockQ6_K);
    case DType::iq4_xs: return sizeof(BlockIQ4_XS);
  }
  return 0;
}

// What n values take that fill whole blocks.
constexpr std::ptrdiff_t bytes_of_values(DType type, std::ptrdiff_t n) {
  return n / values_per_block(type) * static_cast<std::ptrdiff_t>(bytes_per_block(type));
}

constexpr std::string_view name(DType type) {
  switch (type) {
    case DType::f32: return "f32";
    case DType::f16: return "f16";
    case DType::bf16: return "bf16";
    case DType::q8_0: return "q8_0";
    case DType::q4_0: return "q4_0";
    case DType::q4_1: return "q4_1";
    case DType::q5_0: return "q5_0";
    case DType::q5_1: return "q5_1";
    case DType::iq4_nl: return "iq4_nl";
    case DType::q2_k: return "q2_k";
    case DType::q3_k: return "q3_k";
    case DType::q4_k: return "q4_k";
    case DType::q5_k: return "q5_k";
    case DType::q6_k: return "q6_k";
    case DType::iq4_xs: return "iq4_xs";
  }
  return "?";
}

constexpr float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

constexpr float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x0400u) {  // normal: the exponent's bias goes from 15 to 127
    return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  const float value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal and zero
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

constexpr bool half_is_finite(std::uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

}  // namespace sbd
