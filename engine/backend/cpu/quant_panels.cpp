#include <array>
#include <cstring>

#include "backend/cpu/quant_layout.h"
#include "core/bytes.h"

namespace sbd::cpu {

namespace {

using Quants = std::array<std::uint32_t, 8>;  // 32 of them, a byte each

// A feature's word of a strip's vector.
std::uint8_t* word_at(std::uint8_t* strip, int vector, int lane) {
  return strip + vector * 64 + lane * 4;
}
void put(std::uint8_t* strip, int vector, int lane, std::uint32_t word) {
  std::memcpy(word_at(strip, vector, lane), &word, 4);
}
std::uint32_t take(const std::uint8_t* strip, int vector, int lane) {
  return load_as<std::uint32_t>(strip + vector * 64 + lane * 4);
}

constexpr std::uint32_t kOnes = 0x01010101u;  // times what each byte is masked with

// Bit `bit` of every quant.
void put_plane(std::uint8_t* strip, int vector, int lane, const Quants& q, int bit) {
  std::uint32_t plane = 0;
  for (int j = 0; j < 8; ++j) plane |= (q[j] >> bit & kOnes) << j;
  put(strip, vector, lane, plane);
}
void take_plane(const std::uint8_t* strip, int vector, int lane, Quants& q, int bit) {
  const std::uint32_t plane = take(strip, vector, lane);
  for (int j = 0; j < 8; ++j) q[j] |= (plane >> j & kOnes) << bit;
}

template <int kBits>
void put_quants(std::uint8_t* strip, int lane, const Quants& q) {
  if constexpr (kBits == 8) {
    for (int j = 0; j < 8; ++j) put(strip, j, lane, q[j]);
  } else if constexpr (kBits == 4 || kBits == 5) {
    for (int j = 0; j < 4; ++j) {
      put(strip, j, lane, (q[j] & 15 * kOnes) | (q[j + 4] & 15 * kOnes) << 4);
    }
    if constexpr (kBits == 5) put_plane(strip, 4, lane, q, 4);
  } else if constexpr (kBits == 6) {
    for (int j = 0; j < 8; ++j) {
      if (j % 4 == 3) continue;
      const std::uint32_t last = q[j / 4 * 4 + 3];
      put(strip, j / 4 * 3 + j % 4, lane, q[j] | (last >> (j % 4 * 2) & 3 * kOnes) << 6);
    }
  } else {
    for (int part = 0; part < 2; ++part) {
      std::uint32_t twos = 0;
      for (int k = 0; k < 4; ++k) twos |= (q[part * 4 + k] & 3 * kOnes) << (2 * k);
      put(strip, part, lane, twos);
    }
    if constexpr (kBits == 3) put_plane(strip, 2, lane, q, 2);
  }
}

template <int kBits>
Quants take_quants(const std::uint8_t* strip, int lane) {
  Quants q{};
  for (int j = 0; j < 8; ++j) {
    if constexpr (kBits == 8) {
      q[j] = take(strip, j, lane);
    } else if constexpr (kBits == 4 || kBits == 5) {
      q[j] = take(strip, j % 4, lane) >> (j / 4 * 4) & 15 * kOnes;
    } else if constexpr (kBits == 6) {
      const auto word = [&](int k) { return take(strip, j / 4 * 3 + k, lane); };
      if (j % 4 < 3) {
        q[j] = word(j % 4) & 63 * kOnes;
      } else {
        for (int k = 0; k < 3; ++k) q[j] |= (word(k) >> 6 & 3 * kOnes) << (2 * k);
      }
    } else {
      q[j] = take(strip, j / 4, lane) >> (j % 4 * 2) & 3 * kOnes;
    }
  }
  if constexpr (kBits == 5) take_plane(strip, 4, lane, q, 4);
  if constexpr (kBits == 3) take_plane(strip, 2, lane, q, 2);
  return q;
}

void put_byte(std::uint8_t* at, int value) { *at = static_cast<std::uint8_t>(value); }
void put_half(std::uint8_t* at, std::uint16_t half) { std::memcpy(at, &half, 2); }
float half_at(const std::uint8_t* at) { return half_to_float(load_as<std::uint16_t>(at)); }

template <DType kType>
bool pack_row(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  using Type = QuantType<kType>;
  using Layout = QuantLayout<kType>;
  using Block = typename Type::Block;
  const int lane = feature % kLanes;
  bool finite = true;
  for (int k = 0; k < cols; k += values_per_block(kType), panel += Layout::kBlock) {
    const auto block = load_as<Block>(source);
    source += sizeof(Block);
    finite &= half_is_finite(block.scale);
    put_half(panel + Layout::kScales + feature * 2, block.scale);
    if constexpr (Type::kHasMins) {
      finite &= half_is_finite(block.min);
      const int sign = Type::kNested ? 0 : 0x8000;
      put_half(panel + Layout::kMins + feature * 2, static_cast<std::uint16_t>(block.min ^ sign));
    }
    for (int step = 0; step < Layout::kBlockSteps; ++step) {
      Quants quants;
      for (int j = 0; j < 8; ++j) quants[j] = Type::four(block, step * kGroupSize + j * 4);
      put_quants<Type::kBits>(
          panel + Layout::kFirstStep + step * Layout::kStep + feature / kLanes * Layout::kStrip,
          lane, quants);
      for (int part = 0; Type::kNested && part < Layout::kParts; ++part) {
        const GroupScale group = Type::group_scale(block, step * Layout::kParts + part);
        std::uint8_t* bytes = panel + (step * Layout::kParts + part) * kPanel + feature;
        if constexpr (Type::kHasMins) put_byte(bytes + Layout::kMinBytes, group.min);
        put_byte(bytes + Layout::kScaleBytes, group.scale | (Layout::kPairs ? group.min << 4 : 0));
      }
    }
  }
  return finite;
}

template <DType kType>
void dequantize_row(const std::uint8_t* panel, int cols, int feature, float* out) {
  using Type = QuantType<kType>;
  using Layout = QuantLayout<kType>;
  for (int g = 0; g < cols / kGroupSize; ++g) {
    const std::uint8_t* block = panel + g / Layout::kBlockSteps * Index{Layout::kBlock};
    const int step = g % Layout::kBlockSteps;
    const Quants quants = take_quants<Type::kBits>(
        block + Layout::kFirstStep + step * Layout::kStep + feature / kLanes * Layout::kStrip,
        feature % kLanes);
    for (int i = 0; i < kGroupSize; ++i) {
      float scale = half_at(block + Layout::kScales + feature * 2);
      float min = Type::kHasMins ? half_at(block + Layout::kMins + feature * 2) : 0;
      if constexpr (Type::kNested) {
        const std::uint8_t* bytes =
            block + (step * Layout::kParts + i / Type::kGroup) * kPanel + feature;
        const int scale_byte = load_as<std::int8_t>(bytes + Layout::kScaleBytes);
        const int min_byte = bytes[Layout::kMinBytes];
        scale *= static_cast<float>(Layout::kPairs ? scale_byte & 15 : scale_byte);
        min *= static_cast<float>(Layout::kPairs ? min_byte >> 4 : min_byte);
      }
      const auto quant = static_cast<int>(quants[i / 4] >> (i % 4 * 8) & 255u);
      const float product = scale * level_of<kType>(quant);
      *out++ = Type::kHasMins ? product - min : product;
    }
  }
}

}  // namespace

Index quant_panel_bytes(DType type, int cols) {
  Index bytes = 0;
  with_quant_type(type, [&](auto t) {
    bytes = Index{cols} / values_per_block(type) * QuantLayout<t()>::kBlock;
  });
  return bytes;
}

bool pack_quants(DType type, const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  bool finite = false;
  with_quant_type(type, [&](auto t) { finite = pack_row<t()>(source, cols, feature, panel); });
  return finite;
}

void dequantize(DType type, const std::uint8_t* panel, int cols, int feature, float* out) {
  with_quant_type(type, [&](auto t) { dequantize_row<t()>(panel, cols, feature, out); });
}

}  // namespace sbd::cpu
