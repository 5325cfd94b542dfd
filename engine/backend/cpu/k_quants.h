// How a panel holds Q4_K and Q6_K weights, for the packer and the kernels. Eight steps of 32
// inputs, a super group, are followed by its scales in half precision; one follows another.
#pragma once

#include <cstddef>

#include "backend/cpu/kernels.h"

namespace sbd::cpu {

inline constexpr int kSuperSteps = kSuperGroupSize / kGroupSize;

// A step: nibbles as in q4_0, then uint8 scales [2][16] and mins [2][16].
// Behind eight: halves [2][16] that multiply the scales and [2][16] that multiply the mins.
struct Q4KLayout {
  static constexpr int kStripNibbles = kLanes * kGroupSize / 2;  // of 16 features
  static constexpr int kScales = 2 * kStripNibbles;
  static constexpr int kMins = kScales + kPanel;
  static constexpr int kStep = kMins + kPanel;
  static constexpr int kSuperScales = kSuperSteps * kStep;
  static constexpr int kSuperMins = kSuperScales + kPanel * 2;
  static constexpr int kSuper = kSuperMins + kPanel * 2;
};
static_assert(Q4KLayout::kStep % 64 == 0 && Q4KLayout::kSuper % 64 == 0);

// A step: quants [2][2][3][16][4] of six bits, for each strip of features inputs 0-15 and 16-31.
// Their three vectors hold inputs 0-3, 4-7 and 8-11, and in the top bits, two each, lowest first,
// inputs 12-15. Then int8 scales [2][16] of inputs 0-15 and [2][16] of 16-31.
// Behind eight: halves [2][16] that multiply the scales.
struct Q6KLayout {
  static constexpr int kVectors = 3 * kLanes * 4;  // of 16 features and 16 inputs
  static constexpr int kScales = 2 * 2 * kVectors;
  static constexpr int kStep = kScales + 2 * kPanel;
  static constexpr int kSuperScales = kSuperSteps * kStep;
  static constexpr int kSuper = kSuperScales + kPanel * 2;
};
static_assert(Q6KLayout::kStep % 64 == 0 && Q6KLayout::kSuper % 64 == 0);

// Each packs a row of the source into a panel; false where a scale is not finite.
bool pack_q4_k(const std::byte* source, int cols, int feature, std::uint8_t* panel);
bool pack_q6_k(const std::byte* source, int cols, int feature, std::uint8_t* panel);

// One feature's weights, [cols].
void dequantize_q4_k(const std::uint8_t* panel, int cols, int feature, float* out);
void dequantize_q6_k(const std::uint8_t* panel, int cols, int feature, float* out);

}  // namespace sbd::cpu
