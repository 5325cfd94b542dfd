// The matmul kernels of every table, against float64 products of the stored blocks.
#include <cmath>
#include <cstddef>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"
#include "check.h"
#include "reference.h"

namespace sbd::cpu {
namespace {

using namespace test;

constexpr int kRows = 67;
const int kRowCounts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 19, 31, 64, 65, 67};

constexpr int kLongRow = 2048;

std::span<const int> out_features(DType type) {  // the tails are one code
  static const int all[] = {1, 15, 16, 17, 31, 32, 33, 100};
  static const int some[] = {1, 17, 32, 33};
  return type == DType::f32 || type == DType::q8_0 ? std::span<const int>(all) : some;
}

std::span<const int> in_features(DType type) {
  static const int grouped[] = {32, 64, 96, kLongRow};
  static const int any[] = {1, 7, 31, 33, 100, 257};  // the last in several runs of steps
  static const int super[] = {256, 768, kLongRow};
  if (values_per_block(type) == 1) return any;
  return values_per_block(type) == kGroupSize ? std::span<const int>(grouped) : super;
}

// Rows of activations in every form, as the backend hands them to the kernels.
struct Rows {
  std::vector<float> values;
  std::vector<std::uint16_t> bf16;
  std::vector<QuantizedGroup> groups;

  Rows(const Kernels& kernels, std::vector<float> x, int cols) : values(std::move(x)) {
    const int rows = static_cast<int>(values.size()) / cols;
    const int even = cols + cols % 2;
    const int n_groups = cols / kGroupSize;
    bf16.resize(static_cast<std::size_t>(rows * even));
    groups.resize(static_cast<std::size_t>(rows * n_groups));
    for (int row = 0; row < rows; ++row) {
      const float* in = values.data() + row * cols;
      kernels.to_bf16(in, cols, bf16.data() + row * even);
      kernels.quantize(in, n_groups * kGroupSize, groups.data() + row * n_groups);
    }
  }

  Activations view(int first_row) const {
    return {values.data(), bf16.data(), groups.data(), first_row};
  }
};

struct Expected {
  std::vector<double> values;     // [rows][features]
  std::vector<double> tolerance;  // how far the type's arithmetic may be from them
};

// The bounds: activations rounded to int8 are off by at most half a step of their group of 32, to
// bf16 by 2^-8 of themselves; every float32 operation by kEps of its result, and partial sums are
// at most the sum of magnitudes.
Expected expected_linear(const StoredTensor& weight, const std::vector<float>& x) {
  const auto rows = static_cast<std::size_t>(weight.shape[0]);
  const auto cols = static_cast<std::size_t>(weight.shape[1]);
  const std::vector<double> w = values_of(weight);
  Expected expected;
  for (std::size_t row = 0; row < x.size() / cols; ++row) {
    const float* in = x.data() + row * cols;
    std::vector<double> input_error(cols, 0.0);
    double top = 0;  // of the group
    for (std::size_t k = 0; k < cols; ++k) {
      if (weight.dtype == DType::bf16) input_error[k] = std::abs(in[k]) * 0x1p-8;
      if (values_per_block(weight.dtype) > 1) {
        if (k % kGroupSize == 0) {
          top = 0;
          for (int i = 0; i < kGroupSize; ++i) top = std::max(top, double{std::abs(in[k + i])});
        }
        input_error[k] = top / 127 * (0.5 + 400 * kEps) + 1e-36;
      }
    }
    for (std::size_t feature = 0; feature < rows; ++feature) {
      double sum = 0, magnitudes = 0, error = 0;
      const double *its = w.data() + feature * cols, *off = input_error.data();
      for (std::size_t k = 0; k < cols; ++k) {
        sum += its[k] * in[k];
        magnitudes += std::abs(its[k]) * (std::abs(in[k]) + off[k]);
        error += std::abs(its[k]) * off[k];
      }
      expected.values.push_back(sum);
      expected.tolerance.push_back(error + magnitudes * (static_cast<double>(cols) + 4) * kEps +
                                   1e-36);
    }
  }
  return expected;
}

struct Case {
  const Kernels* kernels;
  const StoredTensor* weight;
  std::string operator()() const {
    return std::string(kernels->name) + ", " + std::string(name(weight->dtype)) + " [" +
           std::to_string(weight->shape[0]) + ", " + std::to_string(weight->shape[1]) + "]";
  }
};

// Rows [first_row, first_row + n) times panels [begin, end), [n][features]; what lies around the
// output stays as it was.
std::vector<float> run_linear(const Case& where, const PackedWeight& weight, const Rows& x,
                              int first_row, int n, int begin, int end, const float* bias = nullptr,
                              const std::vector<float>* accumulate = nullptr) {
  const int features = std::min(end * kPanel, weight.rows()) - begin * kPanel;
  const int stride = features + 3;
  std::vector<float> out(static_cast<std::size_t>(n * stride), kGuard);
  std::vector<float> result;
  for (int row = 0; accumulate != nullptr && row < n; ++row) {
    std::copy_n(accumulate->data() + row * features, features, out.data() + row * stride);
  }
  where.kernels->linear({weight.matrix(), x.view(first_row), n, bias, out.data(), stride,
                         accumulate != nullptr, weight.matrix().data},
                        begin, end);
  for (int row = 0; row < n; ++row) {
    const float* o = out.data() + row * stride;
    result.insert(result.end(), o, o + features);
    for (int i = 0; i < 3; ++i) CHECK_IN(where(), o[features + i] == kGuard);
  }
  return result;
}

// Every row of `some`, rows [first_row, ...) and features [first, first + n), is that of `all`.
bool same_rows(const std::vector<float>& some, const std::vector<float>& all, int features,
               int first_row, int first, int n) {
  const int rows = static_cast<int>(some.size()) / n;
  bool same = true;
  for (int row = 0; row < rows; ++row) {
    same &= same_bits(some.data() + row * n, all.data() + (first_row + row) * features + first,
                      static_cast<std::size_t>(n));
  }
  return same;
}

void check_linear(const Case& where, const PackedWeight& weight, const std::vector<float>& values,
                  const Expected& expected) {
  const int features = weight.rows();
  const int panels = weight.n_panels();
  const Rows x(*where.kernels, values, weight.cols());
  const auto all = run_linear(where, weight, x, 0, kRows, 0, panels);
  CHECK_CLOSE(where(), all, expected.values, expected.tolerance);

  // However many rows share the call, wherever they start, a row's bits are the same.
  for (const int n : kRowCounts) {
    for (const int first_row : {0, (kRows - n) / 2, kRows - n}) {
      const auto some = run_linear(where, weight, x, first_row, n, 0, panels);
      CHECK_IN(where() + ", rows " + std::to_string(n),
               same_rows(some, all, features, first_row, 0, features));
    }
  }
  // However the panels are split, too.
  for (int begin = 0; begin < panels; ++begin) {
    for (int end = begin + 1; end <= panels; ++end) {
      const auto some = run_linear(where, weight, x, 5, 9, begin, end);
      const int n = std::min(end * kPanel, features) - begin * kPanel;
      CHECK_IN(where() + ", a part of the panels",
               same_rows(some, all, features, 5, begin * kPanel, n));
    }
  }
  // Bias, accumulation and both.
  Random random(9);
  const auto n_features = static_cast<std::size_t>(features);
  const std::vector<float> bias = random.floats(n_features, -3, 3);
  const std::vector<float> before = random.floats(all.size(), -3, 3);
  for (const bool biased : {false, true}) {
    for (const bool accumulated : {false, true}) {
      Expected sum = expected;
      for (std::size_t i = 0; i < all.size(); ++i) {
        sum.values[i] += (biased ? bias[i % n_features] : 0) + (accumulated ? before[i] : 0);
        sum.tolerance[i] += 2 * kEps * (std::abs(expected.values[i]) + 6);
      }
      const auto out = run_linear(where, weight, x, 0, kRows, 0, panels,
                                  biased ? bias.data() : nullptr, accumulated ? &before : nullptr);
      CHECK_CLOSE(where() + ", bias or accumulate", out, sum.values, sum.tolerance);
    }
  }
}

TEST_ON_EVERY_ISA(linear_of_every_type_and_shape) {
  ThreadPool pool(1);
  Arena arena;
  for (const DType type : kDTypes) {
    for (const int features : out_features(type)) {
      for (const int cols : in_features(type)) {
        // Many steps are the same beside few features and many, and take nine tenths of the time.
        if (cols == kLongRow && features != 17 && features != 33) continue;
        Random random(static_cast<std::uint64_t>(features * 10000 + cols));
        const auto weight = random_matrix("w", type, features, cols, 0.1, random);
        const auto x = random.floats(static_cast<std::size_t>(kRows * cols), -2, 3);
        const Expected expected = expected_linear(weight, x);
        const PackedWeight packed(weight.view(), arena, pool);
        for (const Kernels* kernels : tested_kernels()) {
          check_linear({kernels, &weight}, packed, x, expected);
        }
      }
    }
  }
}

// Blocks and activations at the ends of their ranges.
TEST_ON_EVERY_ISA(linear_of_extreme_groups) {
  ThreadPool pool(1);
  Arena arena;
  constexpr int features = 17;
  for (const DType type : kDTypes) {
    if (values_per_block(type) == 1) continue;
    const int cols = std::max(96, values_per_block(type));
    for (const int scale : {0x0000, 0x8000, 0x0001, 0x83ff, 0x3c00, 0x7bff}) {
      for (const int quants : {0x80, 0x7f, 0x00, 0xff}) {
        StoredTensor weight{"w", type, {features, cols}, {}};
        const auto half = static_cast<std::uint16_t>(scale);
        for (int block = 0; block < features * cols / values_per_block(type); ++block) {
          const std::size_t at = weight.bytes.size();
          weight.bytes.resize(at + bytes_per_block(type), static_cast<std::byte>(quants));
          for (const std::size_t place : halves_of(type)) {
            std::memcpy(weight.bytes.data() + at + place, &half, 2);
          }
        }
        Random random(3);
        std::vector<float> x = random.floats(static_cast<std::size_t>(kRows * cols), -1, 1);
        for (int k = 0; k < cols; ++k) {
          x[k] = 0.0f;
          x[cols + k] = 1.0f;  // every quant 127
          x[2 * cols + k] = -1.0f;
          x[3 * cols + k] = k % 2 ? 1.0f : -1.0f;
          x[4 * cols + k] = k == 40 ? 1e30f : 0.5f;
          x[5 * cols + k] *= 1e-40f;
        }
        const Expected expected = expected_linear(weight, x);
        const PackedWeight packed(weight.view(), arena, pool);
        for (const Kernels* kernels : tested_kernels()) {
          check_linear({kernels, &weight}, packed, x, expected);
        }
      }
    }
  }
}

TEST_ON_EVERY_ISA(linear_passes_on_what_is_not_finite) {
  ThreadPool pool(1);
  Arena arena;
  for (const DType type : kDTypes) {
    Random random(4);
    const int cols = short_row(type);
    const auto weight = random_matrix("w", type, 5, cols, 0.1, random);
    const PackedWeight packed(weight.view(), arena, pool);
    for (const Kernels* kernels : tested_kernels()) {
      for (const float bad : {NAN, INFINITY}) {
        auto values = random.floats(static_cast<std::size_t>(3 * cols), -1, 1);
        values[static_cast<std::size_t>(cols + 37)] = bad;
        const Rows x(*kernels, values, cols);
        const auto out = run_linear({kernels, &weight}, packed, x, 0, 3, 0, 1);
        for (int i = 0; i < 15; ++i) {
          CHECK_IN(std::string(kernels->name) + " " + std::string(name(type)),
                   std::isfinite(out[i]) == (i / 5 != 1));
        }
      }
    }
  }
}

// Several weights of different types on one input, split over threads: as one kernel call each.
TEST_ON_EVERY_ISA(backend_linear_equals_the_kernels_for_any_thread_count) {
  constexpr int cols = 256;
  for (const Kernels* kernels : tested_kernels()) {
    const ForcedIsa forced(kernels->name);
    Random random(6);
    const auto values = random.floats(kRows * cols, -2, 2);
    const Rows x(*kernels, values, cols);
    std::vector<StoredTensor> stored;
    for (const DType type : kDTypes) {
      const int features = 16 * (1 + random.below(6)) + random.below(16);
      stored.push_back(random_matrix("w", type, features, cols, 0.1, random));
    }
    const auto bias = random.floats(200, -1, 1);
    for (const int n_threads : {1, 2, 3, 5}) {
      CpuBackend backend(n_threads);
      std::vector<std::unique_ptr<Weight>> weights;
      std::vector<std::vector<float>> outs;
      for (const StoredTensor& tensor : stored) {
        weights.push_back(backend.load_weight(tensor.view()));
        outs.emplace_back(kRows * static_cast<std::size_t>(tensor.shape[0]));
      }
      for (const int rows : {1, 7, 64}) {
        std::vector<Linear> linears;
        for (std::size_t i = 0; i < stored.size(); ++i) {
          linears.push_back({weights[i].get(), i % 2 ? bias.data() : nullptr, outs[i].data()});
        }
        const std::vector<int> anywhere(static_cast<std::size_t>(rows));
        backend.begin({anywhere, anywhere, anywhere, {}}, {}, false);
        backend.linear({values.data()}, linears, /*accumulate=*/false, {});
        for (std::size_t i = 0; i < stored.size(); ++i) {
          const Case where{kernels, &stored[i]};
          const PackedWeight& packed = PackedWeight::of(*weights[i]);
          const auto all =
              run_linear(where, packed, x, 0, rows, 0, packed.n_panels(), linears[i].bias);
          CHECK_IN(where() + ", threads " + std::to_string(n_threads),
                   same_bits(all.data(), outs[i].data(), all.size()));
        }
      }
    }
  }
}

TEST(embeddings_are_the_stored_rows) {
  CpuBackend backend(2);
  for (const DType type : kDTypes) {
    for (const int cols : in_features(type)) {
      Random random(8);
      const auto table = random_matrix("token_embd.weight", type, 37, cols, 0.1, random);
      const auto values = values_of(table);
      const auto weight = backend.load_weight(table.view());
      const std::vector<TokenId> tokens = {36, 0, 16, 15, 0};
      const std::vector<int> positions = {0, 1, 2, 3, 4};
      backend.begin({tokens, positions, positions, {}}, {}, false);
      std::vector<float> out(tokens.size() * static_cast<std::size_t>(cols));
      backend.embed(*weight, nullptr, out.data());
      std::vector<double> expected, tolerance;
      for (const TokenId token : tokens) {
        for (int k = 0; k < cols; ++k) {
          expected.push_back(values[static_cast<std::size_t>(token * cols + k)]);
          tolerance.push_back(std::abs(expected.back()) * kEps);  // one product at most
        }
      }
      CHECK_CLOSE(std::string(name(type)), out, expected, tolerance);
    }
  }
}

TEST(weights_that_are_not_finite_are_named) {
  CpuBackend backend(2);
  for (const DType type : kDTypes) {
    for (const bool infinite : {false, true}) {
      Random random(2);
      auto tensor = random_matrix("blk.3.attn_q.weight", type, 20, short_row(type), 0.1, random);
      backend.load_weight(tensor.view());
      const std::size_t row_bytes = tensor.bytes.size() / 20;
      std::uint16_t half = infinite ? 0xfc00 : 0x7e01;
      if (type == DType::bf16 || type == DType::f32) half = infinite ? 0xff80 : 0x7fc1;
      std::size_t at = 17 * row_bytes;
      if (type == DType::f32) at += 2;  // the high half
      // The scale; the minimum where there is one.
      if (values_per_block(type) > 1) at += infinite ? halves_of(type).back() : halves_of(type)[0];
      if (type == DType::f32) std::fill_n(tensor.bytes.data() + at - 2, 2, std::byte{0});
      std::memcpy(tensor.bytes.data() + at, &half, 2);
      CHECK_THROWS_WITH(backend.load_weight(tensor.view()),
                        "tensor blk.3.attn_q.weight: row 17 holds NaN or infinity: the file is "
                        "damaged, convert it again");
    }
  }
}

}  // namespace
}  // namespace sbd::cpu
