#include "backend/cpu/packed_weight.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "core/error.h"

namespace sbd::cpu {

namespace {

constexpr int kQ8Bytes = kLanes * kGroupSize;  // quants of a panel's group
constexpr int kQ4Bytes = kLanes * kGroupSize / 2;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

Index packed_panel_bytes(DType dtype, int cols) {
  const Index n = cols;
  Index bytes = 0;
  switch (dtype) {
    case DType::f32: bytes = n * kLanes * 4; break;
    case DType::f16: bytes = n * kLanes * 2; break;
    case DType::bf16: bytes = (n + 1) / 2 * kLanes * 4; break;
    case DType::q8_0: bytes = n / kGroupSize * (kQ8Bytes + kLanes * 2); break;
    case DType::q4_0: bytes = n / kGroupSize * (kQ4Bytes + kLanes * 2); break;
  }
  return (bytes + 63) / 64 * 64;
}

template <typename T>
T load_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

bool half_is_finite(std::uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }
bool is_finite(std::uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

// Each packs one row of the source into lane `lane` of its panel; false where a value is not
// finite.
bool pack_f32(const std::byte* source, int cols, int lane, std::uint8_t* panel) {
  bool finite = true;
  for (int k = 0; k < cols; ++k) {
    const auto bits = load_as<std::uint32_t>(source + k * 4);
    finite &= is_finite(bits);
    std::memcpy(panel + (k * kLanes + lane) * 4, &bits, 4);
  }
  return finite;
}

bool pack_f16(const std::byte* source, int cols, int lane, std::uint8_t* panel) {
  bool finite = true;
  for (int k = 0; k < cols; ++k) {
    const auto bits = load_as<std::uint16_t>(source + k * 2);
    finite &= half_is_finite(bits);
    std::memcpy(panel + (k * kLanes + lane) * 2, &bits, 2);
  }
  return finite;
}

bool pack_bf16(const std::byte* source, int cols, int lane, std::uint8_t* panel) {
  bool finite = true;
  for (int k = 0; k < cols; ++k) {
    const auto bits = load_as<std::uint16_t>(source + k * 2);
    finite &= is_finite(static_cast<std::uint32_t>(bits) << 16);
    std::memcpy(panel + ((k / 2 * kLanes + lane) * 2 + k % 2) * 2, &bits, 2);
  }
  return finite;
}

bool pack_q8_0(const std::byte* source, int cols, int lane, std::uint8_t* panel) {
  const int groups = cols / kGroupSize;
  std::uint8_t* scales = panel + groups * kQ8Bytes;
  bool finite = true;
  for (int g = 0; g < groups; ++g) {
    const auto block = load_as<BlockQ8_0>(source + g * sizeof(BlockQ8_0));
    finite &= half_is_finite(block.scale);
    for (int i = 0; i < kGroupSize; i += 4) {
      std::uint32_t four = load_as<std::uint32_t>(block.quants + i) ^ 0x80808080u;  // + 128
      std::memcpy(panel + g * kQ8Bytes + (i / 4 * kLanes + lane) * 4, &four, 4);
    }
    std::memcpy(scales + (g * kLanes + lane) * 2, &block.scale, 2);
  }
  return finite;
}

// GGUF pairs weight i with i + 16 in a byte, which is step i / 4 with step i / 4 + 4.
bool pack_q4_0(const std::byte* source, int cols, int lane, std::uint8_t* panel) {
  const int groups = cols / kGroupSize;
  std::uint8_t* scales = panel + groups * kQ4Bytes;
  bool finite = true;
  for (int g = 0; g < groups; ++g) {
    const auto block = load_as<BlockQ4_0>(source + g * sizeof(BlockQ4_0));
    finite &= half_is_finite(block.scale);
    for (int i = 0; i < kGroupSize / 2; i += 4) {
      std::memcpy(panel + g * kQ4Bytes + (i / 4 * kLanes + lane) * 4, block.nibbles + i, 4);
    }
    std::memcpy(scales + (g * kLanes + lane) * 2, &block.scale, 2);
  }
  return finite;
}

bool pack_row(DType dtype, const std::byte* source, int cols, int lane, std::uint8_t* panel) {
  switch (dtype) {
    case DType::f32: return pack_f32(source, cols, lane, panel);
    case DType::f16: return pack_f16(source, cols, lane, panel);
    case DType::bf16: return pack_bf16(source, cols, lane, panel);
    case DType::q8_0: return pack_q8_0(source, cols, lane, panel);
    case DType::q4_0: return pack_q4_0(source, cols, lane, panel);
  }
  return false;
}

}  // namespace

PackedWeight::PackedWeight(const Tensor& tensor, ThreadPool& pool)
    : Weight(tensor.dtype, static_cast<int>(tensor.shape[0]), static_cast<int>(tensor.shape[1])),
      panel_bytes_(packed_panel_bytes(dtype(), cols())) {
  const auto n_bytes = static_cast<std::size_t>(panel_bytes_ * n_panels());
  pages_ = Pages(n_bytes, n_bytes >= kHugePage);
  const Index row_bytes = static_cast<Index>(tensor.data.size()) / rows();
  std::atomic<int> bad_row{-1};
  pool.run(n_panels(), [&](int panel, int) {
    std::uint8_t* out = pages_.data() + panel * panel_bytes_;
    for (int lane = 0; lane < kLanes && panel * kLanes + lane < rows(); ++lane) {
      const int row = panel * kLanes + lane;
      const std::byte* source = tensor.data.data() + row * row_bytes;
      if (!pack_row(dtype(), source, cols(), lane, out)) bad_row = row;
    }
  });
  SBD_CHECK(bad_row < 0,
            "tensor {}: row {} holds NaN or infinity: the file is damaged, convert it again",
            tensor.name, bad_row.load());
}

void PackedWeight::dequantize_row(int row, float* out) const {
  const std::uint8_t* panel = pages_.data() + row / kLanes * panel_bytes_;
  const int lane = row % kLanes;
  const int groups = cols() / kGroupSize;
  for (int k = 0; k < cols(); ++k) {
    const int g = k / kGroupSize;
    const int i = k % kGroupSize;
    switch (dtype()) {
      case DType::f32: out[k] = load_as<float>(panel + (k * kLanes + lane) * 4); break;
      case DType::f16:
        out[k] = half_to_float(load_as<std::uint16_t>(panel + (k * kLanes + lane) * 2));
        break;
      case DType::bf16:
        out[k] = bf16_to_float(
            load_as<std::uint16_t>(panel + ((k / 2 * kLanes + lane) * 2 + k % 2) * 2));
        break;
      case DType::q8_0: {
        const std::uint8_t* scales = panel + groups * kQ8Bytes;
        const float scale = half_to_float(load_as<std::uint16_t>(scales + (g * kLanes + lane) * 2));
        const int quant = panel[g * kQ8Bytes + (i / 4 * kLanes + lane) * 4 + i % 4] - 128;
        out[k] = scale * static_cast<float>(quant);
        break;
      }
      case DType::q4_0: {
        const std::uint8_t* scales = panel + groups * kQ4Bytes;
        const float scale = half_to_float(load_as<std::uint16_t>(scales + (g * kLanes + lane) * 2));
        const int step = i % 16;
        const int byte = panel[g * kQ4Bytes + (step / 4 * kLanes + lane) * 4 + step % 4];
        out[k] = scale * static_cast<float>((i < 16 ? byte & 15 : byte >> 4) - 8);
        break;
      }
    }
  }
}

}  // namespace sbd::cpu
