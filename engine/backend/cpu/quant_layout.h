// How a panel holds quantised weights, for the packer and the kernels. A step is 32 inputs of the
// panel's features: two strips of quants, each [vectors][16][4]:
//   8 bits    eight vectors of inputs 4 v to 4 v + 3
//   4, 5      four of low and high nibbles: inputs 4 v and 4 v + 16; a fifth holds bit 4 of inputs
//             4 j in its bits j
//   2, 3      two of pairs of bits: inputs 16 v + 4 k in bits 2 k; a third holds bit 2 of inputs
//             4 j in its bits j
//   6         two times three of inputs 0-3, 4-7 and 8-11 of 16, and in their top bits, two each,
//             lowest first, inputs 12-15
#pragma once

#include "backend/cpu/kernels.h"
#include "core/quant_blocks.h"

namespace sbd::cpu {

inline constexpr int kSuperSteps = kSuperGroupSize / kGroupSize;
inline constexpr int kHalves = kPanel * 2;  // bytes of a half precision number of each feature

// Scales are halves [2][16], minima the same. Blocks of 32: a step is followed by its scales, then
// its minima, negated where the type adds them. Blocks of 256, a super group: scales and minima
// come first, then bytes [8][parts][2][16] that multiply the scales, and such that multiply the
// minima, then eight steps; a part is 16 or 32 inputs. Q2_K's two bytes are nibbles of one.
// Constants only: an inline function here would be shared by the kernels' units.
template <DType kType>
struct QuantLayout {
  using Type = QuantType<kType>;
  static constexpr int kParts = kGroupSize / Type::kGroup;
  static constexpr int kStrip = kLanes * kGroupSize * Type::kBits / 8;
  static constexpr int kStep = 2 * kStrip;
  static constexpr bool kPairs = Type::kNested && Type::kHasMins && Type::kBits == 2;

  static constexpr int kSuperBytes = kSuperSteps * kParts * kPanel;
  static constexpr int kScaleBytes = kHalves * (Type::kHasMins ? 2 : 1);
  static constexpr int kMinBytes = kScaleBytes + (kPairs ? 0 : kSuperBytes);
  static constexpr int kFirstStep =
      Type::kNested ? kMinBytes + (Type::kHasMins ? kSuperBytes : 0) : 0;

  // Where in a block's bytes the scales and the minima are, and how long it is.
  static constexpr int kScales = Type::kNested ? 0 : kStep;
  static constexpr int kMins = kScales + kHalves;
  static constexpr int kBlock =
      Type::kNested ? kFirstStep + kSuperSteps * kStep : kStep + kHalves * (Type::kHasMins ? 2 : 1);
  static constexpr int kBlockSteps = Type::kNested ? kSuperSteps : 1;
  static_assert(kBlock % 64 == 0);
};

Index quant_panel_bytes(DType type, int cols);

// Packs a row of the source into a panel; false where a scale is not finite.
bool pack_quants(DType type, const std::byte* source, int cols, int feature, std::uint8_t* panel);

// One feature's weights, [cols].
void dequantize(DType type, const std::uint8_t* panel, int cols, int feature, float* out);

}  // namespace sbd::cpu
