#include "backend/cpu/packed_weight.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "backend/cpu/k_quants.h"
#include "core/bytes.h"
#include "core/error.h"

namespace sbd::cpu {

namespace {

// Bytes of a panel's quantisation group: quants of both strips, then scales, then q4_1's minima.
constexpr int kQ8Quants = kPanel * kGroupSize;
constexpr int kQ4Quants = kPanel * kGroupSize / 2;
constexpr int kQ8Group = kQ8Quants + kPanel * 2;
constexpr int kQ4Group = kQ4Quants + kPanel * 2;
constexpr int kQ4_1Group = kQ4Group + kPanel * 2;

Index packed_panel_bytes(DType dtype, int cols) {
  const Index n = cols;
  switch (dtype) {
    case DType::f32: return n * kPanel * 4;
    case DType::f16: return n * kPanel * 2;
    case DType::bf16: return (n + 1) / 2 * kPanel * 4;
    case DType::q8_0: return n / kGroupSize * kQ8Group;
    case DType::q4_0: return n / kGroupSize * kQ4Group;
    case DType::q4_1: return n / kGroupSize * kQ4_1Group;
    case DType::q4_k: return n / kSuperGroupSize * Q4KLayout::kSuper;
    case DType::q6_k: return n / kSuperGroupSize * Q6KLayout::kSuper;
  }
  return 0;
}

// Where in a panel a feature's input k, or its group's quant i and scale, lie (kernels.h).
Index f32_at(int k, int feature) { return (Index{k} * kPanel + feature) * 4; }
Index f16_at(int k, int feature) { return (Index{k} * kPanel + feature) * 2; }
Index bf16_at(int k, int feature) { return (Index{k} / 2 * kPanel + feature) * 4 + k % 2 * 2; }
Index q8_at(int i, int feature) {
  return feature / kLanes * (kQ8Quants / 2) + (i / 4 * kLanes + feature % kLanes) * 4 + i % 4;
}
// GGUF pairs quant i with i + 16 in a byte, which is step i / 4 with step i / 4 + 4.
Index q4_at(int i, int feature) {
  return feature / kLanes * (kQ4Quants / 2) + (i / 4 * kLanes + feature % kLanes) * 4 + i % 4;
}

bool is_finite(std::uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

// Each packs one row of the source into a panel; false where a value is not finite.
bool pack_f32(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  bool finite = true;
  for (int k = 0; k < cols; ++k) {
    const auto bits = load_as<std::uint32_t>(source + k * 4);
    finite &= is_finite(bits);
    std::memcpy(panel + f32_at(k, feature), &bits, 4);
  }
  return finite;
}

bool pack_f16(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  bool finite = true;
  for (int k = 0; k < cols; ++k) {
    const auto bits = load_as<std::uint16_t>(source + k * 2);
    finite &= half_is_finite(bits);
    std::memcpy(panel + f16_at(k, feature), &bits, 2);
  }
  return finite;
}

bool pack_bf16(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  bool finite = true;
  for (int k = 0; k < cols; ++k) {
    const auto bits = load_as<std::uint16_t>(source + k * 2);
    finite &= is_finite(static_cast<std::uint32_t>(bits) << 16);
    std::memcpy(panel + bf16_at(k, feature), &bits, 2);
  }
  return finite;
}

bool pack_q8_0(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  bool finite = true;
  for (int g = 0; g < cols / kGroupSize; ++g, panel += kQ8Group) {
    const auto block = load_as<BlockQ8_0>(source + g * sizeof(BlockQ8_0));
    finite &= half_is_finite(block.scale);
    for (int i = 0; i < kGroupSize; i += 4) {
      std::uint32_t four = load_as<std::uint32_t>(block.quants + i) ^ 0x80808080u;  // + 128
      std::memcpy(panel + q8_at(i, feature), &four, 4);
    }
    std::memcpy(panel + kQ8Quants + feature * 2, &block.scale, 2);
  }
  return finite;
}

// Q4_0, and Q4_1, whose minima are kept negated.
template <typename Block, int kGroupBytes>
bool pack_q4(const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  bool finite = true;
  for (int g = 0; g < cols / kGroupSize; ++g, panel += kGroupBytes) {
    const auto block = load_as<Block>(source + g * sizeof(Block));
    finite &= half_is_finite(block.scale);
    for (int i = 0; i < kGroupSize / 2; i += 4) {
      std::memcpy(panel + q4_at(i, feature), block.nibbles + i, 4);
    }
    std::memcpy(panel + kQ4Quants + feature * 2, &block.scale, 2);
    if constexpr (kGroupBytes == kQ4_1Group) {
      finite &= half_is_finite(block.min);
      const auto minus_min = static_cast<std::uint16_t>(block.min ^ 0x8000u);
      std::memcpy(panel + kQ4Group + feature * 2, &minus_min, 2);
    }
  }
  return finite;
}

bool pack_row(DType dtype, const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  switch (dtype) {
    case DType::f32: return pack_f32(source, cols, feature, panel);
    case DType::f16: return pack_f16(source, cols, feature, panel);
    case DType::bf16: return pack_bf16(source, cols, feature, panel);
    case DType::q8_0: return pack_q8_0(source, cols, feature, panel);
    case DType::q4_0: return pack_q4<BlockQ4_0, kQ4Group>(source, cols, feature, panel);
    case DType::q4_1: return pack_q4<BlockQ4_1, kQ4_1Group>(source, cols, feature, panel);
    case DType::q4_k: return pack_q4_k(source, cols, feature, panel);
    case DType::q6_k: return pack_q6_k(source, cols, feature, panel);
  }
  return false;
}

}  // namespace

PackedWeight::PackedWeight(const Tensor& tensor, Arena& arena, ThreadPool& pool)
    : Weight(tensor.dtype, static_cast<int>(tensor.shape[0]), static_cast<int>(tensor.shape[1])),
      panel_bytes_(packed_panel_bytes(dtype(), cols())),
      panels_(arena.allocate(static_cast<std::size_t>(panel_bytes_ * n_panels()))) {
  const Index row_bytes = static_cast<Index>(tensor.data.size()) / rows();
  std::atomic<int> bad_row{-1};
  pool.run(n_panels(), [&](int panel, int) {
    std::uint8_t* out = panels_.get() + panel * panel_bytes_;
    for (int feature = 0; feature < kPanel && panel * kPanel + feature < rows(); ++feature) {
      const int row = panel * kPanel + feature;
      const std::byte* source = tensor.data.data() + row * row_bytes;
      if (!pack_row(dtype(), source, cols(), feature, out)) bad_row = row;
    }
  });
  SBD_CHECK(bad_row < 0,
            "tensor {}: row {} holds NaN or infinity: the file is damaged, convert it again",
            tensor.name, bad_row.load());
}

void PackedWeight::dequantize_row(int row, float* out) const {
  const std::uint8_t* panel = panels_.get() + row / kPanel * panel_bytes_;
  const int feature = row % kPanel;
  for (int k = 0; k < cols(); ++k) {
    const int g = k / kGroupSize;
    const int i = k % kGroupSize;
    switch (dtype()) {
      case DType::f32: out[k] = load_as<float>(panel + f32_at(k, feature)); break;
      case DType::f16:
        out[k] = half_to_float(load_as<std::uint16_t>(panel + f16_at(k, feature)));
        break;
      case DType::bf16:
        out[k] = bf16_to_float(load_as<std::uint16_t>(panel + bf16_at(k, feature)));
        break;
      case DType::q8_0: {
        const std::uint8_t* group = panel + Index{g} * kQ8Group;
        const auto scale = load_as<std::uint16_t>(group + kQ8Quants + feature * 2);
        out[k] = half_to_float(scale) * static_cast<float>(group[q8_at(i, feature)] - 128);
        break;
      }
      case DType::q4_0: {
        const std::uint8_t* group = panel + Index{g} * kQ4Group;
        const auto scale = load_as<std::uint16_t>(group + kQ4Quants + feature * 2);
        const int byte = group[q4_at(i % 16, feature)];
        out[k] = half_to_float(scale) * static_cast<float>((i < 16 ? byte & 15 : byte >> 4) - 8);
        break;
      }
      case DType::q4_1: {
        const std::uint8_t* group = panel + Index{g} * kQ4_1Group;
        const auto scale = load_as<std::uint16_t>(group + kQ4Quants + feature * 2);
        const auto min = load_as<std::uint16_t>(group + kQ4Group + feature * 2);
        const int byte = group[q4_at(i % 16, feature)];
        out[k] = half_to_float(scale) * static_cast<float>(i < 16 ? byte & 15 : byte >> 4) -
                 half_to_float(min);
        break;
      }
      case DType::q4_k: return dequantize_q4_k(panel, cols(), feature, out);  // all of the row
      case DType::q6_k: return dequantize_q6_k(panel, cols(), feature, out);
    }
  }
}

}  // namespace sbd::cpu
