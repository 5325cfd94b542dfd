#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "backend/cpu/packed_weight.h"
#include "core/error.h"

namespace sbd::cpu {

namespace {

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
T* grown(std::vector<T>& buffer, Index n) {
  if (static_cast<Index>(buffer.size()) < n) buffer.resize(static_cast<std::size_t>(n));
  return buffer.data();
}

}  // namespace

CpuKv::CpuKv(int n_layers, const HeadShape& heads, int n_ctx, DType dtype)
    : dtype_(dtype),
      n_heads_(heads.num_key_value_heads),
      padded_dim_(round_up(heads.head_dim, kLanes)) {
  const Index element = static_cast<Index>(bytes_per_block(dtype));
  const Index positions = round_up(n_ctx, kKeysPerStep);
  keys_bytes_ = positions * heads.head_dim * element;
  values_bytes_ = positions * padded_dim_ * element;
  const Index head_bytes = keys_bytes_ + values_bytes_;
  pages_ = Pages(static_cast<std::size_t>(head_bytes * n_layers * n_heads_), /*huge=*/false);
}

std::uint8_t* CpuKv::keys(int layer, int head) const {
  const Index index = static_cast<Index>(layer) * n_heads_ + head;
  return pages_.data() + index * (keys_bytes_ + values_bytes_);
}

std::uint8_t* CpuKv::values(int layer, int head) const { return keys(layer, head) + keys_bytes_; }

CpuBackend::CpuBackend(int n_threads) : pool_(n_threads), kernels_(select_kernels()) {
  tiles_.resize(static_cast<std::size_t>(pool_.size()));
  token_ids_.resize(static_cast<std::size_t>(pool_.size()));
}

std::string CpuBackend::description() const { return format("cpu ({})", kernels_.name); }

std::unique_ptr<Weight> CpuBackend::load_weight(const Tensor& tensor) {
  return std::make_unique<PackedWeight>(tensor, pool_);
}

Buffer CpuBackend::allocate(std::size_t n_floats) {
  constexpr std::align_val_t kAlign{64};
  auto* data = static_cast<float*>(::operator new(n_floats * sizeof(float), kAlign));
  return {data, [](float* p) { ::operator delete(p, kAlign); }};
}

Buffer CpuBackend::upload(std::span<const float> values) {
  Buffer buffer = allocate(values.size());
  std::copy(values.begin(), values.end(), buffer.get());
  return buffer;
}

std::unique_ptr<KvStorage> CpuBackend::allocate_kv(int n_layers, const HeadShape& heads, int n_ctx,
                                                   DType dtype) {
  return std::make_unique<CpuKv>(n_layers, heads, n_ctx, dtype);
}

void CpuBackend::begin(const ForwardRows& rows, std::span<const float> inverse_frequencies,
                       bool rope_interleaved) {
  rows_ = rows;
  rope_interleaved_ = rope_interleaved;
  const Index n_angles = static_cast<Index>(rows.positions.size() * inverse_frequencies.size());
  float* cos = grown(cos_, n_angles);
  float* sin = grown(sin_, n_angles);
  for (const int position : rows.positions) {
    for (const float frequency : inverse_frequencies) {
      const float angle = static_cast<float>(position) * frequency;
      *cos++ = std::cos(angle);
      *sin++ = std::sin(angle);
    }
  }
}

void CpuBackend::embed(const Weight& table, float* out) {
  const PackedWeight& weight = PackedWeight::of(table);
  const Index cols = table.cols();
  pool_.run(n_rows(),
            [&](int row, int) { weight.dequantize_row(rows_.tokens[row], out + row * cols); });
}

void CpuBackend::rms_norm(const float* x, std::span<const int> rows, const float* weight, float eps,
                          int cols, float* out) {
  const int n = rows.empty() ? n_rows() : static_cast<int>(rows.size());
  pool_.run(n, [&](int i, int) {
    const Index row = rows.empty() ? i : rows[i];
    kernels_.rms_norm(x + row * cols, weight, eps, cols, out + Index{i} * cols);
  });
}

Activations CpuBackend::prepare(const float* x, int n_rows, std::span<const Linear> linears) {
  bool bf16 = false;
  bool quantized = false;
  for (const Linear& l : linears) {
    bf16 |= l.weight->dtype() == DType::bf16;
    quantized |= values_per_block(l.weight->dtype()) > 1;
  }
  const int cols = linears[0].weight->cols();
  const Index n = n_rows;
  Activations result{};
  result.values = x;
  if (bf16) {
    const Index even = round_up(cols, 2);
    std::uint16_t* out = grown(bf16_, n * even);
    pool_.run(n_rows, [&](int row, int) {
      std::uint16_t* o = out + row * even;
      o[even - 1] = 0;
      kernels_.to_bf16(x + Index{row} * cols, cols, o);
    });
    result.bf16 = out;
  }
  if (quantized) {
    const Index groups = cols / kGroupSize;
    std::int8_t* quants = grown(quants_, n * cols);
    float* scales = grown(scales_, n * groups);
    std::int32_t* sums = grown(sums_, n * groups);
    pool_.run(n_rows, [&](int row, int) {
      const Index at = Index{row} * cols;
      kernels_.quantize(x + at, cols, quants + at, scales + row * groups, sums + row * groups);
    });
    result.quants = quants;
    result.scales = scales;
    result.sums = sums;
  }
  return result;
}

void CpuBackend::linear(const float* x, int n_rows, std::span<const Linear> linears,
                        bool accumulate) {
  const Activations activations = prepare(x, n_rows, linears);
  int n_panels = 0;
  for (const Linear& l : linears) n_panels += PackedWeight::of(*l.weight).n_panels();

  // A task is a panel, counted through all weights.
  struct Place {
    const Linear* linear;
    int panel;
    PackedMatrix matrix;
    const std::uint8_t* data() const { return matrix.data + panel * matrix.panel_bytes; }
  };
  const auto place = [&](int task) {
    const Linear* l = linears.data();
    for (;; ++l) {
      const PackedWeight& weight = PackedWeight::of(*l->weight);
      if (task < weight.n_panels()) return Place{l, task, weight.matrix()};
      task -= weight.n_panels();
    }
  };
  pool_.run(n_panels, [&](int task, int) {
    const auto [l, panel, matrix] = place(task);
    const std::uint8_t* next = place(std::min(task + 1, n_panels - 1)).data();
    kernels_.linear({matrix, activations, n_rows, l->bias, l->out + Index{panel} * kPanel,
                     matrix.rows, accumulate, next},
                    panel, panel + 1);
  });
}

void CpuBackend::swiglu(float* gate, const float* up, int cols) {
  constexpr int kChunk = 2048;
  const int chunks = (cols + kChunk - 1) / kChunk;
  pool_.run(n_rows() * chunks, [&](int task, int) {
    const int begin = task % chunks * kChunk;
    const Index at = Index{task / chunks} * cols + begin;
    kernels_.swiglu(gate + at, up + at, std::min(kChunk, cols - begin));
  });
}

}  // namespace sbd::cpu
