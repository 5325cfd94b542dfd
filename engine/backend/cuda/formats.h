// How weights lie in device memory, and how the tensor cores' operands come out of it.
//
// A block of 128 output features by a chunk of 64 inputs is one stage: consecutive bytes, copied to
// shared memory as they are. Within it a tile of 16 features and a step of 32 inputs gives lane
// (g, t), g = lane / 4, t = lane % 4, the step's inputs 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3 of
// the features g and g + 8, which is what two m16n8k16 products of 16 inputs each need where the
// inner dimension is taken in that order by both operands. Rows of activations lie in that order
// (place_in_step), so a lane reads 16 bytes of them at a time. Features and inputs beyond the
// matrix are zeros.
#pragma once

#include <type_traits>

#include "backend/cuda/ptx.h"
#include "backend/cuda/units.h"
#include "core/dtype.h"
#include "core/quant_blocks.h"

namespace sbd::cuda {

inline constexpr int kTileFeatures = 16;
inline constexpr int kBlockTiles = kBlockFeatures / kTileFeatures;
inline constexpr int kChunkSteps = kChunk / kStepInputs;
inline constexpr int kSuperChunks = kSuperGroupSize / kChunk;
inline constexpr int kScaleBytes = kBlockFeatures * kChunkSteps * 2;  // of a stage of quants

// Where in a stage an element lies.
struct Place {
  int tile, eight, lane, step, j;  // eight: of the tile's features; j: of the lane's inputs
};

__host__ __device__ inline Place place_of(int feature, int k) {
  const int at = place_in_step(k);
  return {feature % kBlockFeatures / kTileFeatures, feature % kTileFeatures / 8,
          feature % 8 * 4 + at / 8, k % kChunk / kStepInputs, at % 8};
}

// Where a chunk's stage begins in its block of features, and what its super-block shares: behind
// each four stages of a K-quant.
template <typename Format>
__host__ __device__ Index stage_at(int chunk) {
  return Index{chunk} * Format::kStageBytes + Index{chunk / kSuperChunks} * Format::kSuperBytes;
}
template <typename Format>
__host__ __device__ Index super_at(int chunk) {
  const int first = chunk / kSuperChunks * kSuperChunks;
  return stage_at<Format>(first) + Index{kSuperChunks} * Format::kStageBytes;
}

// The operand of two steps of a product, of one tile.
using TileOperand = std::uint32_t[2][4];

// f16 and bf16: [8 tiles][2 steps][2 products][32 lanes][2 pairs of inputs][2 eights][2], so that
// an operand is four registers of one load.
struct ShortLayout {
  static constexpr int kStageBytes = kBlockFeatures * kChunk * 2;
  static constexpr int kSuperBytes = 0;
  static constexpr bool kScaled = false, kHasMins = false;

  __device__ static int offset(const Place& p) {
    return ((p.tile * kChunkSteps + p.step) * 2 + p.j / 4) * 512 + p.lane * 16 + p.j / 2 % 2 * 8 +
           p.eight * 4 + p.j % 2 * 2;
  }

  __device__ static void load(const std::uint8_t* stage, int tile, int step, int lane,
                              TileOperand& a) {
    const auto* at =
        reinterpret_cast<const uint4*>(stage) + (tile * kChunkSteps + step) * 64 + lane;
    const uint4 first = at[0], second = at[32];
    a[0][0] = first.x, a[0][1] = first.y, a[0][2] = first.z, a[0][3] = first.w;
    a[1][0] = second.x, a[1][1] = second.y, a[1][2] = second.z, a[1][3] = second.w;
  }
};

struct F16Format : ShortLayout {
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_halves(d, a, b0, b1);
  }
  __device__ static float value(const std::uint8_t* stage, const std::uint8_t*, const Place& p) {
    return half_to_float(*reinterpret_cast<const std::uint16_t*>(stage + offset(p)));
  }
};

struct BF16Format : ShortLayout {
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_bf16(d, a, b0, b1);
  }
  __device__ static float value(const std::uint8_t* stage, const std::uint8_t*, const Place& p) {
    return bf16_to_float(*reinterpret_cast<const std::uint16_t*>(stage + offset(p)));
  }
};

// [8 tiles][2 steps][32 lanes][2 eights][8] as quant + 128: a byte under that of the half 1024 is
// 1024 + byte, and 1152 less is the quant.
struct ByteQuants {
  static constexpr int kBytes = kBlockFeatures * kChunk;

  __device__ static void load(const std::uint8_t* stage, int tile, int step, int lane,
                              TileOperand& a) {
    const uint4 q = reinterpret_cast<const uint4*>(stage)[(tile * kChunkSteps + step) * 32 + lane];
    operand(q.x, q.z, a[0]);
    operand(q.y, q.w, a[1]);
  }

  __device__ static int quant(const std::uint8_t* stage, const Place& p) {
    return stage[offset(p) + p.j];
  }
  // A lane's quants 0 to 3 and 4 to 7, a byte each, into a stage of zeros.
  __device__ static void store(std::uint8_t* stage, const Place& p, std::uint32_t first,
                               std::uint32_t second) {
    *reinterpret_cast<uint2*>(stage + offset(p)) = uint2{first, second};
  }

 private:
  __device__ static int offset(const Place& p) {
    return (p.tile * kChunkSteps + p.step) * 512 + p.lane * 16 + p.eight * 8;
  }
  __device__ static std::uint32_t halves(std::uint32_t bytes, unsigned selector) {
    return fma_halves(__byte_perm(bytes, 0x64646464u, selector), 0x3c003c00u, 0xe480e480u);
  }
  __device__ static void operand(std::uint32_t low, std::uint32_t high, std::uint32_t (&a)[4]) {
    a[0] = halves(low, 0x4140), a[1] = halves(high, 0x4140);
    a[2] = halves(low, 0x4342), a[3] = halves(high, 0x4342);
  }
};

// [8 tiles][2 steps][32 lanes][2 eights] words of eight nibbles: those of inputs j and j + 1, j
// even, are j / 2 and j / 2 + 4, so that one mask gives a pair, one in the low bits of each half of
// the word. Under the exponent of 1024 that is 1024 + nibble, or 1024 + 16 nibble.
// Behind them the bits of quants above four, pairs likewise in the halves of a lane's words: [8
// tiles][kHighBits words][32 lanes], of which half a word has [2 steps][2 eights][4 pairs], or with
// two bits a word a step.
template <int kHighBits, int kOffset>
struct NibbleQuants {
  static constexpr int kNibbleBytes = kBlockFeatures * kChunk / 2;
  static constexpr int kBytes = kNibbleBytes + kBlockFeatures * kChunk / 8 * kHighBits;

  __device__ static void load(const std::uint8_t* stage, int tile, int step, int lane,
                              TileOperand& a) {
    const uint2 q = reinterpret_cast<const uint2*>(stage)[(tile * kChunkSteps + step) * 32 + lane];
    std::uint32_t highs = 0;
    if constexpr (kHighBits > 0) {
      highs = *high_word(stage, tile, step, lane) >> high_shift(step, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      std::uint32_t* to = a[j / 4] + j / 2 % 2 * 2;
      to[0] = pair(q.x, highs, 0, j);
      to[1] = pair(q.y, highs, 1, j);
    }
  }

  __device__ static int quant(const std::uint8_t* stage, const Place& p) {
    const std::uint32_t nibbles = *reinterpret_cast<const std::uint32_t*>(stage + offset(p));
    std::uint32_t q = nibbles >> shift(p.j) & 15u;
    if constexpr (kHighBits > 0) {
      const std::uint32_t highs = *high_word(stage, p.tile, p.step, p.lane);
      q |= (highs >> high_shift(p.step, p.eight, p.j) & ((1u << kHighBits) - 1)) << 4;
    }
    return static_cast<int>(q);
  }
  __device__ static void store(std::uint8_t* stage, const Place& p, std::uint32_t first,
                               std::uint32_t second) {
    std::uint32_t nibbles = 0, highs = 0;
    for (int j = 0; j < 8; ++j) {
      const std::uint32_t q = (j < 4 ? first : second) >> (j % 4 * 8) & 255u;
      nibbles |= (q & 15u) << shift(j);
      if constexpr (kHighBits > 0) highs |= q >> 4 << high_shift(p.step, p.eight, j);
    }
    *reinterpret_cast<std::uint32_t*>(stage + offset(p)) = nibbles;
    if constexpr (kHighBits > 0) {  // other features and steps have their bits in the word
      atomicOr(high_word(stage, p.tile, p.step, p.lane), highs);
    }
  }

 private:
  __device__ static int offset(const Place& p) {
    return (p.tile * kChunkSteps + p.step) * 256 + p.lane * 8 + p.eight * 4;
  }
  __device__ static int shift(int j) { return (j / 2 + j % 2 * 4) * 4; }

  template <typename Byte>
  __device__ static auto* high_word(Byte* stage, int tile, int step, int lane) {
    using Word = std::conditional_t<std::is_const_v<Byte>, const std::uint32_t, std::uint32_t>;
    const int word = tile * kHighBits + step * kHighBits / kChunkSteps;
    return reinterpret_cast<Word*>(stage + kNibbleBytes) + word * 32 + lane;
  }
  __device__ static int high_shift(int step, int eight, int j) {
    return (step * 8 + eight * 4 + j / 2) * kHighBits % 16 + j % 2 * 16;
  }

  // Quants j and j + 1, as halves.
  __device__ static std::uint32_t pair(std::uint32_t nibbles, std::uint32_t highs, int eight,
                                       int j) {
    const bool odd = j / 2 % 2 != 0;
    const int bits_at = odd ? 4 : 0;
    std::uint32_t bits = and_or(nibbles >> (j / 4 * 8), 0x000f000fu << bits_at, 0x64006400u);
    if constexpr (kHighBits > 0) {
      constexpr std::uint32_t kOne = (1u << kHighBits) - 1, kMask = kOne | kOne << 16;
      const int to = bits_at + 4, from = (eight * 4 + j / 2) * kHighBits;
      bits = and_or(from < to ? highs << (to - from) : highs >> (from - to), kMask << to, bits);
    }
    // (1024 + q) - (1024 + offset), or (1024 + 16 q) / 16 - (64 + offset)
    constexpr std::uint32_t kLow = 0xe400u + kOffset, kHigh = 0xd400u + kOffset * 16;
    return odd ? fma_halves(bits, 0x2c002c00u, kHigh | kHigh << 16)
               : fma_halves(bits, 0x3c003c00u, kLow | kLow << 16);
  }
};

// Of a tile's step, a lane's: what the products of the first sixteen inputs and of the second, with
// the features g and g + 8, are multiplied by, and what sums of inputs are, to be subtracted.
struct Factors {
  float scale[2][2];
  float min[2];
};

// Byte i of a word.
__device__ inline float byte_value(std::uint32_t word, int i) {  // 2^23 + byte, less 2^23
  const auto selector = 0x7440u | static_cast<unsigned>(i);
  return __uint_as_float(__byte_perm(word, 0x4b000000u, selector)) - 8388608.0f;
}

// Quants become halves without rounding, and are multiplied as such; the scale of a feature's 32 or
// 16 inputs is applied to their sum in float32. So only activations are rounded.
//
// Behind the quants 16 bits for each feature and step, [8 tiles][8 g][2 steps][2 eights]: a scale
// in half precision; of K-quants two bytes, the group's scale and minimum, or the scales + 128 of
// both groups of 16, and [8 tiles][8 g][2 eights] of (scale) or (scale, min) for 256 inputs behind
// four stages. So Q4_K and Q5_K, whose six-bit numbers get bytes, take 148 and 180 bytes for 256
// weights, of 144 and 176 in the file; Q6_K takes 210 as there.
template <DType kDType>
struct QuantFormat {
  static constexpr DType kType = kDType;
  using Type = QuantType<kType>;
  using Quants =
      std::conditional_t<Type::kBits == 8, ByteQuants,
                         NibbleQuants<Type::kBits == 8 ? 0 : Type::kBits - 4, Type::kOffset>>;
  static_assert(!Type::kHasLevels && (Type::kNested || !Type::kHasMins));
  static constexpr int kStageBytes = Quants::kBytes + kScaleBytes;
  static constexpr bool kScaled = true, kHasMins = Type::kHasMins;
  static constexpr int kSuperHalves = !Type::kNested ? 0 : kHasMins ? 2 : 1;  // of a feature
  static constexpr int kSuperBytes = kSuperHalves * kBlockFeatures * 2;
  static constexpr bool kTwoScales = Type::kGroup < kStepInputs;  // of a step

  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_halves(d, a, b0, b1);
  }
  __device__ static void load(const std::uint8_t* stage, int tile, int step, int lane,
                              TileOperand& a) {
    Quants::load(stage, tile, step, lane, a);
  }

  __device__ static Factors factors(const std::uint8_t* stage, const std::uint8_t* super, int tile,
                                    int step, int lane) {
    const int g = tile * 8 + lane / 4;
    const auto own =
        reinterpret_cast<const std::uint32_t*>(stage + Quants::kBytes)[g * kChunkSteps + step];
    if constexpr (!Type::kNested) {
      return {{{low_half(own), high_half(own)}}, {}};
    } else if constexpr (kHasMins) {
      const uint2 shared = reinterpret_cast<const uint2*>(super)[g];
      return {{{low_half(shared.x) * byte_value(own, 0), low_half(shared.y) * byte_value(own, 2)}},
              {high_half(shared.x) * byte_value(own, 1), high_half(shared.y) * byte_value(own, 3)}};
    } else {
      const std::uint32_t shared = reinterpret_cast<const std::uint32_t*>(super)[g];
      const float low = low_half(shared), high = high_half(shared);
      return {{{low * (byte_value(own, 0) - 128.0f), high * (byte_value(own, 2) - 128.0f)},
               {low * (byte_value(own, 1) - 128.0f), high * (byte_value(own, 3) - 128.0f)}},
              {}};
    }
  }

  __device__ static float value(const std::uint8_t* stage, const std::uint8_t* super,
                                const Place& p) {
    const Factors all = factors(stage, super, p.tile, p.step, p.lane);
    const float scale = all.scale[kTwoScales ? p.j / 4 : 0][p.eight];
    const float product = scale * static_cast<float>(Quants::quant(stage, p) - Type::kOffset);
    if constexpr (!kHasMins)
      return product;
    else
      return product - all.min[p.eight];
  }

  // One feature's group of 32, the i-th of its block, whose first input is at `first`.
  __device__ static void store(std::uint8_t* stage, std::uint8_t* super, const Place& first,
                               const typename Type::Block& block, int i) {
    const int feature = (first.tile * 8 + first.lane / 4) * 2 + first.eight;  // in lanes' order
    const int at = (feature - first.eight) * kChunkSteps + first.step * 2 + first.eight;
    reinterpret_cast<std::uint16_t*>(stage + Quants::kBytes)[at] = scale_bits(block, i);
    if constexpr (Type::kNested) {
      auto* to = reinterpret_cast<std::uint16_t*>(super) + feature * kSuperHalves;
      if (i == 0) to[0] = block.scale;
      if constexpr (kHasMins) {
        if (i == 0) to[1] = block.min;
      }
    }
    Place p = first;
    for (int t = 0; t < 4; ++t, ++p.lane) {
      const int input = i * kGroupSize + t * 4;
      Quants::store(stage, p, Type::four(block, input), Type::four(block, input + 16));
    }
  }

 private:
  __device__ static std::uint16_t scale_bits(const typename Type::Block& block, int i) {
    if constexpr (!Type::kNested) {
      return block.scale;
    } else if constexpr (kTwoScales) {
      const int low = Type::group_scale(block, 2 * i).scale + 128;
      return static_cast<std::uint16_t>(low | (Type::group_scale(block, 2 * i + 1).scale + 128)
                                                  << 8);
    } else {
      const GroupScale group = Type::group_scale(block, i);
      return static_cast<std::uint16_t>(group.scale | group.min << 8);
    }
  }
};

// fn(the format) of a type whose weights kernels read in stages; false of the others.
template <typename Fn>
bool with_format(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f16: return fn(F16Format()), true;
    case DType::bf16: return fn(BF16Format()), true;
    case DType::q8_0: return fn(QuantFormat<DType::q8_0>()), true;
    case DType::q4_0: return fn(QuantFormat<DType::q4_0>()), true;
    case DType::q4_k: return fn(QuantFormat<DType::q4_k>()), true;
    case DType::q5_k: return fn(QuantFormat<DType::q5_k>()), true;
    case DType::q6_k: return fn(QuantFormat<DType::q6_k>()), true;
    default: return false;
  }
}

}  // namespace sbd::cuda
