// What the blocks of the quantised types hold (dtype.h), type by type: unsigned quants, each
// group's scale and, in some, its minimum. w = scale * level - min, where a level is the quant
// minus an offset or, in IQ4's, of a table.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/dtype.h"

namespace sbd {

struct GroupScale {  // factors of a block's `scale` and `min`
  int scale, min;
};

// Four bytes, the first the lowest.
template <typename Byte>
constexpr std::uint32_t four_bytes(const Byte* p) {
  const auto byte = [p](int i) { return static_cast<std::uint32_t>(p[i] & 255) << (8 * i); };
  return byte(0) | byte(1) | byte(2) | byte(3);
}

// The low four bits of `bits`, one in each byte.
constexpr std::uint32_t spread_bits(std::uint32_t bits) {
  return (bits & 15u) * 0x00204081u & 0x01010101u;
}

// Quants i to i + 3 of 32 whose nibbles lie in 16 bytes, i and i + 16 in one.
constexpr std::uint32_t four_nibbles(const std::uint8_t* nibbles, int i) {
  return four_bytes(nibbles + i % 16) >> (i / 16 * 4) & 0x0f0f0f0fu;
}

// Those of 256 whose pairs of bits lie in 64 bytes; and their bits of one byte for i % 32.
constexpr std::uint32_t four_twos(const std::uint8_t* twos, int i) {
  return four_bytes(twos + i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 0x03030303u;
}
constexpr std::uint32_t four_highs(const std::uint8_t* highs, int i) {
  return four_bytes(highs + i % 32) >> (i / 32) & 0x01010101u;
}

// Of Q4_K and Q5_K. Scales and mins of groups 0-3 are the low six bits of bytes 0-3 and 4-7; groups
// 4-7 have four bits in the nibbles of bytes 8-11, and two on top of bytes 0-3 and 4-7.
constexpr GroupScale six_bits_of(const std::uint8_t* bytes, int g) {
  if (g < 4) return {bytes[g] & 63, bytes[g + 4] & 63};
  return {(bytes[g + 4] & 15) | bytes[g - 4] >> 6 << 4, bytes[g + 4] >> 4 | bytes[g] >> 6 << 4};
}

// What is alike in types: kBits of a quant, what is subtracted of it, weights that share a scale.
template <typename BlockType, int bits, int offset, int group = kGroupSize>
struct QuantTypeBase {
  using Block = BlockType;
  static constexpr int kBits = bits, kOffset = offset, kGroup = group;
  static constexpr bool kHasLevels = false;            // of a table
  static constexpr bool kNested = sizeof(Block) > 64;  // of kSuperGroupSize weights
  static constexpr bool kHasMins = requires(Block b) { b.min; };
  static constexpr GroupScale group_scale(const Block&, int) {
    return {1, -1};
  }  // minima are added
};

// four(): quants i to i + 3, a byte each, i being a multiple of 4.
template <DType kType>
struct QuantType;

template <>
struct QuantType<DType::q8_0> : QuantTypeBase<BlockQ8_0, 8, 128> {
  static constexpr std::uint32_t four(const Block& b, int i) {
    return four_bytes(b.quants + i) ^ 0x80808080u;
  }
};

template <>
struct QuantType<DType::q4_0> : QuantTypeBase<BlockQ4_0, 4, 8> {
  static constexpr std::uint32_t four(const Block& b, int i) { return four_nibbles(b.nibbles, i); }
};

template <>
struct QuantType<DType::q4_1> : QuantTypeBase<BlockQ4_1, 4, 0> {
  static constexpr std::uint32_t four(const Block& b, int i) { return four_nibbles(b.nibbles, i); }
};

template <typename Block, int offset>
struct Q5TypeBase : QuantTypeBase<Block, 5, offset> {
  static constexpr std::uint32_t four(const Block& b, int i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(b.highs[i / 8]) >> (i % 8);
    return four_nibbles(b.nibbles, i) | spread_bits(bits) << 4;
  }
};

template <>
struct QuantType<DType::q5_0> : Q5TypeBase<BlockQ5_0, 16> {};

template <>
struct QuantType<DType::q5_1> : Q5TypeBase<BlockQ5_1, 0> {};

template <>
struct QuantType<DType::iq4_nl> : QuantTypeBase<BlockIQ4_NL, 4, 0> {
  static constexpr bool kHasLevels = true;
  static constexpr std::uint32_t four(const Block& b, int i) { return four_nibbles(b.nibbles, i); }
};

template <>
struct QuantType<DType::q2_k> : QuantTypeBase<BlockQ2_K, 2, 0, kSmallGroupSize> {
  static constexpr std::uint32_t four(const Block& b, int i) { return four_twos(b.twos, i); }
  static constexpr GroupScale group_scale(const Block& b, int g) {
    return {b.scales[g] & 15, b.scales[g] >> 4};
  }
};

template <>
struct QuantType<DType::q3_k> : QuantTypeBase<BlockQ3_K, 3, 4, kSmallGroupSize> {
  static constexpr std::uint32_t four(const Block& b, int i) {
    return four_twos(b.twos, i) | four_highs(b.highs, i) << 2;
  }
  static constexpr GroupScale group_scale(const Block& b, int g) {
    const int low = b.six_bits[g % 8] >> (g / 8 * 4) & 15;
    const int high = b.six_bits[8 + g % 4] >> (g / 4 * 2) & 3;
    return {(low | high << 4) - 32, 0};
  }
};

template <>
struct QuantType<DType::q4_k> : QuantTypeBase<BlockQ4_K, 4, 0> {
  static constexpr std::uint32_t four(const Block& b, int i) {
    const int g = i / kGroupSize;
    return four_bytes(b.nibbles + g / 2 * kGroupSize + i % kGroupSize) >> (g % 2 * 4) & 0x0f0f0f0fu;
  }
  static constexpr GroupScale group_scale(const Block& b, int g) {
    return six_bits_of(b.six_bits, g);
  }
};

template <>
struct QuantType<DType::q5_k> : QuantTypeBase<BlockQ5_K, 5, 0> {
  static constexpr std::uint32_t four(const Block& b, int i) {
    const int g = i / kGroupSize;
    const std::uint32_t lows = four_bytes(b.nibbles + g / 2 * kGroupSize + i % kGroupSize);
    return (lows >> (g % 2 * 4) & 0x0f0f0f0fu) | four_highs(b.highs, i) << 4;
  }
  static constexpr GroupScale group_scale(const Block& b, int g) {
    return six_bits_of(b.six_bits, g);
  }
};

template <>
struct QuantType<DType::q6_k> : QuantTypeBase<BlockQ6_K, 6, 32, kSmallGroupSize> {
  static constexpr std::uint32_t four(const Block& b, int i) {
    const int quarter = i % 128 / 32;  // of the 128 weights that share bytes
    const std::uint32_t lows = four_bytes(b.lows + i / 128 * 64 + i % 64);
    const std::uint32_t highs = four_bytes(b.highs + i / 128 * 32 + i % 32);
    return (lows >> (quarter / 2 * 4) & 0x0f0f0f0fu) | (highs >> (quarter * 2) & 0x03030303u) << 4;
  }
  static constexpr GroupScale group_scale(const Block& b, int g) { return {b.scales[g], 0}; }
};

template <>
struct QuantType<DType::iq4_xs> : QuantTypeBase<BlockIQ4_XS, 4, 0> {
  static constexpr bool kHasLevels = true;
  static constexpr std::uint32_t four(const Block& b, int i) {
    return four_nibbles(b.nibbles + i / kGroupSize * 16, i % kGroupSize);
  }
  static constexpr GroupScale group_scale(const Block& b, int g) {
    const int low = b.scales_low[g / 2] >> (g % 2 * 4) & 15;
    return {(low | (b.scales_high >> (2 * g) & 3) << 4) - 32, 0};
  }
};

template <DType kType>
constexpr float level_of(int quant) {
  if constexpr (QuantType<kType>::kHasLevels) {
    constexpr std::int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};
    return static_cast<float>(kLevels[quant]);  // here, as device code reads no global constants
  } else {
    return static_cast<float>(quant - QuantType<kType>::kOffset);
  }
}

// Weight i of a block. All but the last subtraction is exact in float32.
template <DType kType>
constexpr float block_value(const typename QuantType<kType>::Block& block, int i) {
  using Type = QuantType<kType>;
  const auto quant = static_cast<int>(Type::four(block, i / 4 * 4) >> (i % 4 * 8) & 255u);
  const GroupScale group = Type::group_scale(block, i / Type::kGroup);
  const float scale = half_to_float(block.scale) * static_cast<float>(group.scale);
  const float product = scale * level_of<kType>(quant);
  if constexpr (!Type::kHasMins)
    return product;
  else
    return product - half_to_float(block.min) * static_cast<float>(group.min);
}

// fn(std::integral_constant<DType, ...>) of a quantised type; false of the others.
template <typename Fn>
bool with_quant_type(DType type, Fn&& fn) {
  const auto call = [&]<DType... kTypes>(std::integer_sequence<DType, kTypes...>) {
    return (... || (type == kTypes && (fn(std::integral_constant<DType, kTypes>{}), true)));
  };
  return call(std::integer_sequence<DType, DType::q8_0, DType::q4_0, DType::q4_1, DType::q5_0,
                                    DType::q5_1, DType::iq4_nl, DType::q2_k, DType::q3_k,
                                    DType::q4_k, DType::q5_k, DType::q6_k, DType::iq4_xs>{});
}

}  // namespace sbd
