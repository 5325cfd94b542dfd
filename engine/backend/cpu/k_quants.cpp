#include "backend/cpu/k_quants.h"

#include <cstring>

#include "core/bytes.h"

namespace sbd::cpu {

namespace {

// Where a feature's byte with input i as low (below 16) or high nibble lies in a step of Q4_K.
Index nibble_at(int i, int feature) {
  return feature / kLanes * Q4KLayout::kStripNibbles +
         (i % 16 / 4 * kLanes + feature % kLanes) * 4 + i % 4;
}

// Where in a step of Q6_K a feature's first four bytes for inputs 0-15 or 16-31 lie; the others
// follow at strides of kLanes * 4.
Index sixes_at(int part, int feature) {
  return (feature / kLanes * 2 + part) * Q6KLayout::kVectors + feature % kLanes * 4;
}

struct SixBits {
  std::uint8_t scale, min;
};

// Scale and min of a block's group g. Those of groups 0-3 are the low six bits of bytes 0-3 and
// 4-7; groups 4-7 have four bits in the nibbles of bytes 8-11, and two on top of bytes 0-3 and 4-7.
SixBits six_bits(const std::uint8_t (&bytes)[12], int g) {
  const auto byte = [](int value) { return static_cast<std::uint8_t>(value); };
  if (g < 4) return {byte(bytes[g] & 63), byte(bytes[g + 4] & 63)};
  return {byte((bytes[g + 4] & 15) | (bytes[g - 4] >> 6 << 4)),
          byte((bytes[g + 4] >> 4) | (bytes[g] >> 6 << 4))};
}

}  // namespace

bool pack_q4_k(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  using Layout = Q4KLayout;
  bool finite = true;
  for (int k = 0; k < cols; k += kSuperGroupSize, panel += Layout::kSuper) {
    const auto block = load_as<BlockQ4_K>(source);
    source += sizeof(block);
    finite &= half_is_finite(block.scale) && half_is_finite(block.min);
    for (int g = 0; g < kSuperSteps; ++g) {
      std::uint8_t* step = panel + g * Layout::kStep;
      const auto four = [&](int i) {  // quants i to i + 3, a byte each
        const auto nibbles = load_as<std::uint32_t>(block.nibbles + g / 2 * kGroupSize + i);
        return nibbles >> (g % 2 * 4) & 0x0f0f0f0fu;
      };
      for (int i = 0; i < 16; i += 4) {
        const std::uint32_t bytes = four(i) | four(i + 16) << 4;
        std::memcpy(step + nibble_at(i, feature), &bytes, 4);
      }
      const SixBits bits = six_bits(block.six_bits, g);
      step[Layout::kScales + feature] = bits.scale;
      step[Layout::kMins + feature] = bits.min;
    }
    std::memcpy(panel + Layout::kSuperScales + feature * 2, &block.scale, 2);
    std::memcpy(panel + Layout::kSuperMins + feature * 2, &block.min, 2);
  }
  return finite;
}

bool pack_q6_k(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  using Layout = Q6KLayout;
  bool finite = true;
  for (int k = 0; k < cols; k += kSuperGroupSize, panel += Layout::kSuper) {
    const auto block = load_as<BlockQ6_K>(source);
    source += sizeof(block);
    finite &= half_is_finite(block.scale);
    for (int g = 0; g < kSuperSteps; ++g) {
      std::uint8_t* step = panel + g * Layout::kStep;
      const int quarter = g % 4;      // of the 128 weights that share bytes
      const auto four = [&](int i) {  // quants i to i + 3, a byte each
        const std::uint8_t* lows = block.lows + g / 4 * 64 + quarter % 2 * 32 + i;
        const std::uint8_t* highs = block.highs + g / 4 * 32 + i;
        return (load_as<std::uint32_t>(lows) >> (quarter / 2 * 4) & 0x0f0f0f0fu) |
               (load_as<std::uint32_t>(highs) >> (quarter * 2) & 0x03030303u) << 4;
      };
      for (int part = 0; part < 2; ++part) {
        const std::uint32_t last = four(part * 16 + 12);
        for (int j = 0; j < 3; ++j) {
          const std::uint32_t bytes = four(part * 16 + j * 4) | (last >> (2 * j) & 0x03030303u)
                                                                    << 6;
          std::memcpy(step + sixes_at(part, feature) + j * kLanes * 4, &bytes, 4);
        }
        std::memcpy(step + Layout::kScales + part * kPanel + feature, &block.scales[2 * g + part],
                    1);
      }
    }
    std::memcpy(panel + Layout::kSuperScales + feature * 2, &block.scale, 2);
  }
  return finite;
}

void dequantize_q4_k(const std::uint8_t* panel, int cols, int feature, float* out) {
  using Layout = Q4KLayout;
  for (int g = 0; g < cols / kGroupSize; ++g) {
    const std::uint8_t* super = panel + g / kSuperSteps * Layout::kSuper;
    const std::uint8_t* step = super + g % kSuperSteps * Layout::kStep;
    const auto unit = [&](int at) {
      return half_to_float(load_as<std::uint16_t>(super + at + feature * 2));
    };
    const float scale = unit(Layout::kSuperScales) * step[Layout::kScales + feature];
    const float min = unit(Layout::kSuperMins) * step[Layout::kMins + feature];
    for (int i = 0; i < kGroupSize; ++i) {
      const int quant = step[nibble_at(i, feature)] >> (i / 16 * 4) & 15;
      *out++ = scale * static_cast<float>(quant) - min;
    }
  }
}

void dequantize_q6_k(const std::uint8_t* panel, int cols, int feature, float* out) {
  using Layout = Q6KLayout;
  for (int g = 0; g < cols / kGroupSize; ++g) {
    const std::uint8_t* super = panel + g / kSuperSteps * Layout::kSuper;
    const std::uint8_t* step = super + g % kSuperSteps * Layout::kStep;
    const float unit =
        half_to_float(load_as<std::uint16_t>(super + Layout::kSuperScales + feature * 2));
    for (int i = 0; i < kGroupSize; ++i) {
      const auto scale = load_as<std::int8_t>(step + Layout::kScales + i / 16 * kPanel + feature);
      const std::uint8_t* sixes = step + sixes_at(i / 16, feature) + i % 4;
      const int j = i % 16 / 4;
      int quant = 0;
      if (j < 3) {
        quant = sixes[j * kLanes * 4] & 63;
      } else {
        for (int k = 0; k < 3; ++k) quant |= sixes[k * kLanes * 4] >> 6 << (2 * k);
      }
      *out++ = unit * static_cast<float>(scale) * static_cast<float>(quant - 32);
    }
  }
}

}  // namespace sbd::cpu
