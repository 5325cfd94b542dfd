#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "backend/cpu/packed_weight.h"
#include "core/bytes.h"
#include "core/error.h"
#include "core/random_weight.h"

namespace sbd::cpu {

namespace {

// Bytes of one position of a head.
struct PositionBytes {
  Index key;
  Index value;
  PositionBytes(const HeadShape& heads, DType dtype)
      : key(bytes_of_values(dtype, heads.head_dim)),
        value(bytes_of_values(dtype, round_up(heads.head_dim, kLanes))) {}
};

}  // namespace

CpuKv::CpuKv(int n_layers, const HeadShape& heads, int n_ctx, DType dtype, int interleave)
    : dtype_(dtype),
      n_layers_(n_layers),
      n_heads_(heads.num_key_value_heads),
      padded_dim_(round_up(heads.head_dim, kLanes)),
      interleave_(interleave) {
  const PositionBytes position(heads, dtype);
  const Index positions = round_up(n_ctx, kKeysPerStep);
  key_bytes_ = position.key;
  value_bytes_ = position.value;
  keys_bytes_ = positions * key_bytes_;
  values_bytes_ = positions * value_bytes_;
  const Index head_bytes = keys_bytes_ + values_bytes_;
  pages_ = Pages(static_cast<std::size_t>(head_bytes * n_layers * n_heads_), /*huge=*/false);
}

// What is touched is whole pages, of keys and of values.
std::size_t CpuKv::bytes(int n_layers, const HeadShape& heads, DType dtype, int n_positions) {
  constexpr Index kPage = 4096;
  const PositionBytes position(heads, dtype);
  const Index positions = round_up(n_positions, kKeysPerStep);
  return static_cast<std::size_t>(
      static_cast<Index>(n_layers) * heads.num_key_value_heads *
      (round_up(positions * position.key, kPage) + round_up(positions * position.value, kPage)));
}

// The last step of keys comes whole: what it has beyond n_positions nobody sees.
void CpuKv::copy(const KvStorage& from, int n_positions) {
  const auto& other = static_cast<const CpuKv&>(from);
  const Index positions = round_up(n_positions, kKeysPerStep);
  for (int i = 0; i < n_layers_ * n_heads_; ++i) {
    std::memcpy(plane(i), other.plane(i), static_cast<std::size_t>(positions * key_bytes_));
    std::memcpy(plane(i) + keys_bytes_, other.plane(i) + other.keys_bytes_,
                static_cast<std::size_t>(positions * value_bytes_));
  }
}

std::uint8_t* CpuKv::plane(int index) const {
  return pages_.data() + index * (keys_bytes_ + values_bytes_);
}

std::uint8_t* CpuKv::keys(int layer, int head) const { return plane(layer * n_heads_ + head); }

std::uint8_t* CpuKv::values(int layer, int head) const { return keys(layer, head) + keys_bytes_; }

CpuBackend::CpuBackend(int n_threads) : pool_(n_threads), kernels_(select_kernels()) {
  tiles_.resize(static_cast<std::size_t>(pool_.size()));
  token_ids_.resize(static_cast<std::size_t>(pool_.size()));
}

std::string CpuBackend::description() const { return format("cpu ({})", kernels_.name); }

double CpuBackend::weight_bytes(DType dtype, double rows, double cols) const {
  return Backend::weight_bytes(dtype, std::ceil(rows / kPanel) * kPanel, cols);  // whole panels
}

std::unique_ptr<Weight> CpuBackend::load_weight(const Tensor& tensor) {
  return std::make_unique<PackedWeight>(tensor, weight_memory_, pool_);
}

std::unique_ptr<Weight> CpuBackend::random_weight(DType dtype, int rows, int cols,
                                                  std::uint64_t key) {
  const auto row_blocks = static_cast<std::size_t>(cols / values_per_block(dtype));
  const std::size_t block_bytes = bytes_per_block(dtype);
  std::vector<std::byte> file(static_cast<std::size_t>(rows) * row_blocks * block_bytes);
  pool_.run(rows, [&](int row, int) {
    const std::size_t first = static_cast<std::size_t>(row) * row_blocks;
    for (std::size_t i = first; i < first + row_blocks; ++i) {
      random_block(dtype, key, i, reinterpret_cast<std::uint8_t*>(file.data() + i * block_bytes));
    }
  });
  return load_weight({"random weights", dtype, {rows, cols}, file});
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
  const bool is_short = dtype == DType::f16 || dtype == DType::bf16;
  const int interleave = is_short ? kernels_.short_interleave : 1;
  return std::make_unique<CpuKv>(n_layers, heads, n_ctx, dtype, interleave);
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

void CpuBackend::embed(const Weight& table, const float* mask, float* out) {
  const PackedWeight& weight = PackedWeight::of(table);
  const Index cols = table.cols();
  pool_.run(n_rows(), [&](int row, int) {
    const TokenId token = rows_.tokens[row];
    if (token == kMaskSlot) {
      std::copy(mask, mask + cols, out + row * cols);
    } else {
      weight.dequantize_row(token, out + row * cols);
    }
  });
}

void CpuBackend::mix(std::span<const Mix> rows, const float* x, const float* y, int cols,
                     float* out) {
  const Index n = cols;
  pool_.run(static_cast<int>(rows.size()), [&](int row, int) {
    const Mix& from = rows[row];
    float* sum = out + row * n;
    std::fill(sum, sum + n, 0.0f);
    const auto add = [&](const float* terms, float factor) {
      if (factor == 0.0f) return;
      for (Index i = 0; i < n; ++i) sum[i] += factor * terms[i];
    };
    add(x + from.x_row * n, from.a);
    add(y + from.y_row * n, from.b);
  });
}

Activations CpuBackend::prepare(const Input& input, std::span<const Linear> linears,
                                std::span<const OutputRow> outputs) {
  bool bf16 = false;
  bool quantized = false;
  for (const Linear& l : linears) {
    bf16 |= l.weight->dtype() == DType::bf16;
    quantized |= values_per_block(l.weight->dtype()) > 1;
  }
  const int n = outputs.empty() ? n_rows() : static_cast<int>(outputs.size());
  const Index cols = linears[0].weight->cols();
  const Index even = cols + cols % 2;
  const Index groups = cols / kGroupSize;
  const bool as_it_is = outputs.empty() && input.norm_weight == nullptr && input.up == nullptr;
  float* values = as_it_is ? nullptr : grown(values_, n * cols);
  Activations result{};
  result.values = as_it_is ? input.x : values;
  if (bf16) result.bf16 = grown(bf16_, n * even);
  if (quantized) result.groups = grown(groups_, n * groups);
  if (as_it_is && !bf16 && !quantized) return result;
  pool_.run(n, [&](int row, int) {
    const Index source = (outputs.empty() ? row : outputs[row].row) * cols;
    const float* x = input.x + source;
    const int n_cols = static_cast<int>(cols);
    if (!as_it_is) {
      float* out = values + row * cols;
      if (input.norm_weight != nullptr) {
        kernels_.rms_norm(x, input.norm_weight, input.eps, n_cols, out);
      } else if (input.up != nullptr) {
        kernels_.swiglu(x, input.up + source, n_cols, out);
      } else {
        std::copy(x, x + cols, out);
      }
      x = out;
    }
    if (bf16) {
      std::uint16_t* out = bf16_.data() + row * even;
      out[even - 1] = 0;
      kernels_.to_bf16(x, n_cols, out);
    }
    if (quantized) kernels_.quantize(x, n_cols, groups_.data() + row * groups);
  });
  return result;
}

void CpuBackend::linear(const Input& input, std::span<const Linear> linears, bool accumulate,
                        std::span<const Linear> then) {
  const auto changed = [](const Linear& l) { return l.adapter.a != nullptr; };
  if (!rows_.adapted.empty() && std::ranges::any_of(linears, changed)) {
    linear_adapted(input, linears, accumulate, then);
    return;
  }
  const Interval all{0, n_rows()};
  const Activations x = prepare(input, linears);
  if (observer_) observer_(linears, x.values, n_rows());
  products_.clear();
  for (const Linear& l : linears) products_.push_back({l, x, {&all, 1}, accumulate});
  multiply(products_, then);
}

// The adapters' first factors read what the weights read, so they share a pass over the threads'
// tasks: at its beginning, where their long panels leave nobody waiting. The second ones follow.
void CpuBackend::linear_adapted(const Input& input, std::span<const Linear> linears,
                                bool accumulate, std::span<const Linear> then) {
  Index n_values = 0;
  for (const Linear& l : linears) {
    if (l.adapter.a != nullptr) n_values += Index{n_rows()} * l.adapter.a->rows();
  }
  float* values = grown(low_rank_values_, n_values);
  inputs_.clear();
  low_rank_.clear();
  for (const Linear& l : linears) {
    if (l.adapter.a == nullptr) continue;
    inputs_.push_back({l.adapter.a, nullptr, values});
    low_rank_.push_back({l.adapter.b, nullptr, l.out, l.adapter});
    values += Index{n_rows()} * l.adapter.a->rows();
  }
  const std::size_t n_adapters = inputs_.size();
  inputs_.insert(inputs_.end(), linears.begin(), linears.end());
  const Interval all{0, n_rows()};
  const Activations x = prepare(input, inputs_);
  products_.clear();
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const bool adapter = i < n_adapters;
    products_.push_back(
        {inputs_[i], x, adapter ? rows_.adapted : std::span(&all, 1), !adapter && accumulate});
  }
  multiply(products_, low_rank_);

  products_.clear();
  for (std::size_t i = 0; i < n_adapters; ++i) {
    products_.push_back({low_rank_[i], {}, rows_.adapted, true, low_rank_[i].adapter.scale});
    products_.back().x.values = inputs_[i].out;
  }
  prepare_low_rank();
  multiply(products_, then);
}

// The adapted rows of products_' inputs, in the forms that their weights' types need.
void CpuBackend::prepare_low_rank() {
  const auto type_of = [](const Product& p) { return p.linear.weight->dtype(); };
  const auto needed = [&](const Product& p) {
    return type_of(p) == DType::bf16 || values_per_block(type_of(p)) > 1;
  };
  if (std::ranges::none_of(products_, needed)) return;
  Index ranks = 0;
  for (const Product& p : products_) ranks += round_up(p.linear.weight->cols(), kGroupSize);
  std::uint16_t* bf16 = grown(bf16_, n_rows() * ranks);
  QuantizedGroup* groups = grown(groups_, n_rows() * ranks / kGroupSize);
  for (Product& p : products_) {
    p.x.bf16 = bf16;
    p.x.groups = groups;
    const Index size = n_rows() * Index{round_up(p.linear.weight->cols(), kGroupSize)};
    bf16 += size;
    groups += size / kGroupSize;
  }
  int n_adapted = 0;
  for (const Interval& rows : rows_.adapted) n_adapted += rows.end - rows.begin;
  pool_.run(n_adapted, [&](int task, int) {
    const Interval* rows = rows_.adapted.data();
    for (; task >= rows->end - rows->begin; ++rows) task -= rows->end - rows->begin;
    const Index row = rows->begin + task;
    for (const Product& p : products_) {
      if (!needed(p)) continue;
      const int rank = p.linear.weight->cols();
      const float* x = p.x.values + row * rank;
      if (type_of(p) == DType::bf16) {
        const Index even = rank + rank % 2;
        std::uint16_t* out = bf16_.data() + (p.x.bf16 - bf16_.data()) + row * even;
        out[even - 1] = 0;
        kernels_.to_bf16(x, rank, out);
      } else {
        const Index at = (p.x.groups - groups_.data()) + row * (rank / kGroupSize);
        kernels_.quantize(x, rank, groups_.data() + at);
      }
    }
  });
}

namespace {

// The panels of several weights, counted through all of them.
template <typename T>
struct Place {
  const T* of;
  PackedMatrix matrix;
  int panel;
  const std::uint8_t* data() const { return matrix.data + panel * matrix.panel_bytes; }
};

const PackedWeight& weight_of(const Linear& linear) { return PackedWeight::of(*linear.weight); }
template <typename Product>
const PackedWeight& weight_of(const Product& product) {
  return weight_of(product.linear);
}

template <typename T>
int count_panels(std::span<const T> weights) {
  int n = 0;
  for (const T& each : weights) n += weight_of(each).n_panels();
  return n;
}

template <typename T>
Place<T> find_panel(std::span<const T> weights, int panel) {
  for (const T* each = weights.data();; ++each) {
    const PackedWeight& weight = weight_of(*each);
    if (panel < weight.n_panels()) return {each, weight.matrix(), panel};
    panel -= weight.n_panels();
  }
}

}  // namespace

void CpuBackend::multiply(std::span<const Product> products, std::span<const Linear> then) {
  const int n_panels = count_panels(products);
  const int n_then = count_panels(then);
  pool_.run(n_panels, [&](int task, int thread) {
    const Place<Product> place = find_panel(products, task);
    const Product& product = *place.of;
    const std::uint8_t* next = place.data();  // where nothing else is known
    if (task + 1 < pool_.first_task(thread + 1, n_panels)) {
      next = find_panel(products, task + 1).data();
    } else if (n_then > 0) {
      next = find_panel(then, pool_.first_task(thread, n_then)).data();
    }
    float* out = product.linear.out + Index{place.panel} * kPanel;
    const Index stride = place.matrix.rows;
    for (const Interval& rows : product.rows) {
      Activations x = product.x;
      x.first_row = rows.begin;
      kernels_.linear({place.matrix, x, rows.end - rows.begin, product.linear.bias,
                       out + rows.begin * stride, stride, product.accumulate, next, product.scale},
                      place.panel, place.panel + 1);
    }
  });
}

}  // namespace sbd::cpu
