#include "backend/cpu/packed_weight.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "backend/cpu/quant_layout.h"
#include "core/bytes.h"
#include "core/error.h"

namespace sbd::cpu {

namespace {

Index packed_panel_bytes(DType dtype, int cols) {
  const Index n = cols;
  switch (dtype) {
    case DType::f32: return n * kPanel * 4;
    case DType::f16: return n * kPanel * 2;
    case DType::bf16: return (n + 1) / 2 * kPanel * 4;
    default: return quant_panel_bytes(dtype, cols);
  }
}

// Where in a panel a feature's input k lies (kernels.h).
Index f32_at(int k, int feature) { return (Index{k} * kPanel + feature) * 4; }
Index f16_at(int k, int feature) { return (Index{k} * kPanel + feature) * 2; }
Index bf16_at(int k, int feature) { return (Index{k} / 2 * kPanel + feature) * 4 + k % 2 * 2; }

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

bool pack_row(DType dtype, const std::byte* source, int cols, int feature, std::uint8_t* panel) {
  switch (dtype) {
    case DType::f32: return pack_f32(source, cols, feature, panel);
    case DType::f16: return pack_f16(source, cols, feature, panel);
    case DType::bf16: return pack_bf16(source, cols, feature, panel);
    default: return pack_quants(dtype, source, cols, feature, panel);
  }
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
  if (values_per_block(dtype()) > 1) return dequantize(dtype(), panel, cols(), feature, out);
  for (int k = 0; k < cols(); ++k) {
    switch (dtype()) {
      case DType::f16:
        out[k] = half_to_float(load_as<std::uint16_t>(panel + f16_at(k, feature)));
        break;
      case DType::bf16:
        out[k] = bf16_to_float(load_as<std::uint16_t>(panel + bf16_at(k, feature)));
        break;
      default: out[k] = load_as<float>(panel + f32_at(k, feature));
    }
  }
}

}  // namespace sbd::cpu
