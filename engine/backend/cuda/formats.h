// How weights lie in device memory, and how the tensor cores' operands come out of it.
//
// A block of 128 output features by a chunk of 64 inputs is one stage: consecutive bytes, copied to
// shared memory as they are. Within it a tile of 16 features and 32 inputs gives lane (g, t),
// g = lane / 4, t = lane % 4, the inputs 8t to 8t + 7 of the features g and g + 8, which is what
// two steps of the m16n8k16 product need where the inner dimension is taken in that order by both
// operands. So a lane reads 16 bytes at a time, and a row of activations stays row-major.
// Features and inputs beyond the matrix are zeros.
#pragma once

#include "backend/cuda/ptx.h"
#include "backend/cuda/units.h"
#include "core/dtype.h"

namespace sbd::cuda {

inline constexpr int kTileFeatures = 16;
inline constexpr int kStepInputs = 32;  // of a tile
inline constexpr int kBlockTiles = kBlockFeatures / kTileFeatures;
inline constexpr int kChunkSteps = kChunk / kStepInputs;
inline constexpr int kQuantScaleBytes = kBlockFeatures * kChunkSteps * 2;

// Where in a stage an element lies.
struct Place {
  int tile, eight, lane, step, j;  // eight: of the tile's features; j: of the lane's inputs
};

__host__ __device__ inline Place place_of(int feature, int k) {
  const int lane = feature % 8 * 4 + k % kStepInputs / 8;
  return {feature % kBlockFeatures / kTileFeatures, feature % kTileFeatures / 8, lane,
          k % kChunk / kStepInputs, k % 8};
}

// The operand of two steps of a product, of one tile.
using TileOperand = std::uint32_t[2][4];

// f16 and bf16: [8 tiles][2 steps][2 products][32 lanes][2 pairs of inputs][2 eights][2], so that
// an operand is four registers of one load.
struct ShortLayout {
  static constexpr int kStageBytes = kBlockFeatures * kChunk * 2;
  static constexpr bool kScaled = false;

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
  __device__ static float value(const std::uint8_t* stage, const Place& p) {
    return half_to_float(*reinterpret_cast<const std::uint16_t*>(stage + offset(p)));
  }
};

struct BF16Format : ShortLayout {
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_bf16(d, a, b0, b1);
  }
  __device__ static float value(const std::uint8_t* stage, const Place& p) {
    return bf16_to_float(*reinterpret_cast<const std::uint16_t*>(stage + offset(p)));
  }
};

// Quants become halves without rounding, and are multiplied as such; the scale of a feature's 32
// inputs is applied to their sum in float32. So only activations are rounded.
// Behind the quants: scales [8 tiles][8 g][2 steps][2 eights]
template <int kQuantBytes>
struct QuantLayout {
  static constexpr int kStageBytes = kQuantBytes + kQuantScaleBytes;
  static constexpr int kWarpLanes = 32;
  static constexpr bool kScaled = true;

  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_halves(d, a, b0, b1);
  }
  // The scales of the lane's two features.
  __device__ static std::uint32_t scales(const std::uint8_t* stage, int tile, int step, int lane) {
    return reinterpret_cast<const std::uint32_t*>(
        stage + kQuantBytes)[(tile * 8 + lane / 4) * kChunkSteps + step];
  }
  __device__ static float scale(const std::uint8_t* stage, const Place& p) {
    const std::uint32_t pair = scales(stage, p.tile, p.step, p.lane);
    return half_to_float(static_cast<std::uint16_t>(p.eight ? pair >> 16 : pair));
  }
};

// [8 tiles][2 steps][32 lanes][2 eights][8] as quant + 128: a byte under that of the half 1024 is
// 1024 + byte, and 1152 less is the quant.
struct Q8Format : QuantLayout<kBlockFeatures * kChunk> {
  __device__ static int offset(const Place& p) {
    return (p.tile * kChunkSteps + p.step) * 512 + p.lane * 16 + p.eight * 8 + p.j;
  }

  __device__ static std::uint32_t halves(std::uint32_t bytes, unsigned selector) {
    return fma_halves(__byte_perm(bytes, 0x64646464u, selector), 0x3c003c00u, 0xe480e480u);
  }

  __device__ static void load(const std::uint8_t* stage, int tile, int step, int lane,
                              TileOperand& a) {
    const uint4 q =
        reinterpret_cast<const uint4*>(stage)[(tile * kChunkSteps + step) * kWarpLanes + lane];
    operand(q.x, q.z, a[0]);
    operand(q.y, q.w, a[1]);
  }

  __device__ static float value(const std::uint8_t* stage, const Place& p) {
    return scale(stage, p) * static_cast<float>(stage[offset(p)] - 128);
  }

 private:
  __device__ static void operand(std::uint32_t low, std::uint32_t high, std::uint32_t (&a)[4]) {
    a[0] = halves(low, 0x4140), a[1] = halves(high, 0x4140);
    a[2] = halves(low, 0x4342), a[3] = halves(high, 0x4342);
  }
};

// [8 tiles][2 steps][32 lanes][2 eights] words of eight nibbles: those of inputs j and j + 1, j
// even, are j / 2 and j / 2 + 4, so that one mask gives a pair, one in the low bits of each half of
// the word. Under the exponent of 1024 that is 1024 + nibble, or 1024 + 16 nibble.
struct Q4Format : QuantLayout<kBlockFeatures * kChunk / 2> {
  __device__ static int offset(const Place& p) {
    return (p.tile * kChunkSteps + p.step) * 256 + p.lane * 8 + p.eight * 4;
  }
  __device__ static int shift(int j) { return (j / 2 + j % 2 * 4) * 4; }

  __device__ static void load(const std::uint8_t* stage, int tile, int step, int lane,
                              TileOperand& a) {
    const uint2 q =
        reinterpret_cast<const uint2*>(stage)[(tile * kChunkSteps + step) * kWarpLanes + lane];
    operand(q.x, q.y, a[0]);
    operand(q.x >> 8, q.y >> 8, a[1]);
  }

  __device__ static float value(const std::uint8_t* stage, const Place& p) {
    const auto word = *reinterpret_cast<const std::uint32_t*>(stage + offset(p));
    return scale(stage, p) * static_cast<float>(static_cast<int>(word >> shift(p.j) & 15u) - 8);
  }

 private:
  __device__ static std::uint32_t low_pair(std::uint32_t word) {  // (1024 + n) - 1032
    return fma_halves(and_or(word, 0x000f000fu, 0x64006400u), 0x3c003c00u, 0xe408e408u);
  }
  __device__ static std::uint32_t high_pair(std::uint32_t word) {  // (1024 + 16 n) / 16 - 72
    return fma_halves(and_or(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
  }
  __device__ static void operand(std::uint32_t low, std::uint32_t high, std::uint32_t (&a)[4]) {
    a[0] = low_pair(low), a[1] = low_pair(high);
    a[2] = high_pair(low), a[3] = high_pair(high);
  }
};

}  // namespace sbd::cuda
