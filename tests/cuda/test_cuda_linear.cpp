// Packing and matmuls of every weight type against float64.
#include "cuda_check.h"

namespace sbd::cuda {
namespace {

using namespace test;

struct Case {
  DType dtype;
  int features, cols, rows;
  bool bias, accumulate;
};

std::string where(const Case& c) {
  return std::string(name(c.dtype)) + " [" + std::to_string(c.features) + ", " +
         std::to_string(c.cols) + "] x " + std::to_string(c.rows);
}

// What rounding a row's activations costs: half a unit of 8 or 11 bits, and the float32 sums.
double rounding(DType dtype, int cols) {
  double of_type = dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
  if (becomes_halves(dtype)) of_type *= 2;  // the weights' own
  return of_type * 1.01 + (cols + 4) * kEps;
}

std::vector<float> multiply(CudaBackend& backend, const Weight& weight, const Case& c,
                            const std::vector<float>& x, const std::vector<float>& bias,
                            const std::vector<float>& before) {
  const Buffer input = backend.upload(x), out = backend.upload(before);
  const Buffer b = c.bias ? backend.upload(bias) : nullptr;
  begin_rows(backend, c.rows);
  const Linear linear{&weight, b.get(), out.get()};
  backend.linear({input.get()}, {&linear, 1}, c.accumulate, {});
  return backend.download(out.get(), before.size());
}

void check_linear(CudaBackend& backend, const Case& c) {
  Random random(static_cast<std::uint64_t>(c.cols * 100 + c.rows));
  const auto stored = random_matrix("w", c.dtype, c.features, c.cols, 0.1, random);
  const auto weight = backend.load_weight(stored.view());
  CHECK_IN(where(c), (weight->dtype() != c.dtype) == becomes_halves(c.dtype));
  const auto values = values_of(stored);
  const auto n_x = static_cast<std::size_t>(c.rows * c.cols);
  const auto n_out = static_cast<std::size_t>(c.rows * c.features);
  const auto x = random.floats(n_x, -2, 2);
  const auto bias = random.floats(static_cast<std::size_t>(c.features), -1, 1);
  const auto before = random.floats(n_out, -1, 1);
  const auto out = multiply(backend, *weight, c, x, bias, before);
  std::vector<double> expected, tolerance;
  for (int row = 0; row < c.rows; ++row) {
    for (int feature = 0; feature < c.features; ++feature) {
      const std::size_t at = expected.size();
      double sum = 0, size = 0;
      for (int k = 0; k < c.cols; ++k) {
        const double product = static_cast<double>(x[static_cast<std::size_t>(row * c.cols + k)]) *
                               values[static_cast<std::size_t>(feature * c.cols + k)];
        sum += product;
        size += std::abs(product);
      }
      if (c.bias) sum += bias[static_cast<std::size_t>(feature)];
      if (c.accumulate) sum += before[at];
      expected.push_back(sum);
      tolerance.push_back(size * rounding(c.dtype, c.cols) + 4 * kEps);
    }
  }
  CHECK_CLOSE(where(c), out, expected, tolerance);
}

TEST(cuda_linear_agrees_with_float64) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) {
    const auto whole = [&](int cols) { return whole_blocks(dtype, cols); };
    for (const int cols : {32, 64, 96, 320}) {
      if (cols == 32 || whole(cols) != whole(32)) {
        check_linear(backend, {dtype, 40, whole(cols), 3, true, false});
      }
    }
    for (const int rows : {1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 130}) {
      check_linear(backend, {dtype, 130, whole(64), rows, false, true});
    }
    check_linear(backend, {dtype, 1, whole(32), 1, true, true});
    // In several splits, of which some begin within a super-block.
    check_linear(backend, {dtype, 128, 1024, 9, true, true});
    check_linear(backend, {dtype, 257, 2048, 2, false, false});
    check_linear(backend, {dtype, 130, 2304, 20, false, false});
    // Rows prepared in several strips.
    check_linear(backend, {dtype, 20, whole(8256), 2, false, false});
  }
  for (const DType dtype : kDTypes) {
    if (!becomes_halves(dtype)) continue;
    const int block = values_per_block(dtype);
    for (const int cols : {block, 3 * block}) {
      check_linear(backend, {dtype, 131, cols, 3, true, false});
    }
  }
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int cols : {1, 5, 63, 65}) check_linear(backend, {dtype, 9, cols, 2, true, false});
  }
}

TEST(cuda_linear_of_many_rows_agrees_with_float64) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) {
    for (const int rows : {65, 128, 129, 200, 300, 513}) {
      check_linear(backend, {dtype, many_features(rows), whole_blocks(dtype, 96), rows, rows != 129,
                             rows == 129});
    }
    for (const int cols : {32, 64, 128, 192, 448}) {  // fewer chunks than stages, as many, and more
      if (cols % values_per_block(dtype) != 0 && cols != 448) continue;
      check_linear(backend, {dtype, many_features(66), whole_blocks(dtype, cols), 66, true, true});
    }
  }
}

// In either width of tile; and where no inputs are split, as 160 and 256 never are, few rows as
// well.
TEST(cuda_many_rows_are_the_same_bits_in_any_company) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) {
    Random random(9);
    const int cols = whole_blocks(dtype, 160);
    const int features = many_features(65);
    const auto stored = random_matrix("w", dtype, features, cols, 0.1, random);
    const auto weight = backend.load_weight(stored.view());
    const auto x = random.floats(static_cast<std::size_t>(600 * cols), -2, 2);
    const auto run = [&](int first, int n) {
      const auto begin = x.begin() + first * cols;
      return multiply(backend, *weight, {dtype, features, cols, n, false, false},
                      {begin, begin + n * cols}, {},
                      std::vector<float>(static_cast<std::size_t>(n * features)));
    };
    const auto whole = run(0, 600);
    for (const auto& [first, n] : {std::pair{0, 70}, {130, 100}, {257, 343}, {5, 9}}) {
      const auto some = run(first, n);
      CHECK_IN(std::string(name(dtype)) + " from " + std::to_string(first),
               same_bits(some.data(), whole.data() + first * features, some.size()));
    }
  }
}

// Rows alone, and in tiles of any size.
TEST(cuda_rows_are_the_same_bits_in_any_company) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) {
    Random random(6);
    const Case all{dtype, 140, whole_blocks(dtype, 1056), 70, false, false};
    const auto stored = random_matrix("w", dtype, all.features, all.cols, 0.1, random);
    const auto weight = backend.load_weight(stored.view());
    const auto x = random.floats(static_cast<std::size_t>(all.rows * all.cols), -2, 2);
    const auto run = [&](int first, int n) {
      Case some = all;
      some.rows = n;
      const auto begin = x.begin() + first * all.cols;
      return multiply(backend, *weight, some, {begin, begin + n * all.cols}, {},
                      std::vector<float>(static_cast<std::size_t>(n * all.features)));
    };
    const auto whole = run(0, 70);
    for (const auto& [first, n] : {std::pair{0, 1}, {69, 1}, {3, 9}, {40, 20}, {5, 50}}) {
      const auto some = run(first, n);
      CHECK_IN(where(all) + " from " + std::to_string(first),
               same_bits(some.data(), whole.data() + first * all.features, some.size()));
    }
  }
}

// Several weights on one input, of one type and of different ones, behind RMSNorm and SwiGLU.
TEST(cuda_linear_norms_gates_and_groups) {
  CudaBackend backend(0);
  Random random(7);
  for (const auto& [rows, cols, gated] : {std::tuple{11, 160, false},
                                          {11, 160, true},
                                          {150, 160, false},
                                          {150, 160, true},
                                          {11, 256, false},
                                          {150, 256, true}}) {
    const auto n = static_cast<std::size_t>(rows * cols);
    const auto x = random.floats(n, -3, 3), up = random.floats(n, -2, 2);
    const auto norm = random.floats(static_cast<std::size_t>(cols), 0.5, 2);
    const Buffer x_buffer = backend.upload(x), up_buffer = backend.upload(up),
                 norm_buffer = backend.upload(norm);
    std::vector<double> input;
    for (int row = 0; row < rows; ++row) {
      double squares = 0;
      for (int k = 0; k < cols; ++k)
        squares += std::pow(x[static_cast<std::size_t>(row * cols + k)], 2);
      for (int k = 0; k < cols; ++k) {
        const auto at = static_cast<std::size_t>(row * cols + k);
        const double value = x[at];
        input.push_back(gated ? value / (1 + std::exp(-value)) * up[at]
                              : value / std::sqrt(squares / cols + 1e-5) *
                                    norm[static_cast<std::size_t>(k)]);
      }
    }
    const std::vector<std::vector<DType>> mixes = {
        {DType::bf16, DType::bf16, DType::bf16},
        {DType::q8_0, DType::f16, DType::q8_0, DType::f32, DType::bf16, DType::q4_0},
        {DType::f16, DType::f16, DType::f16, DType::f16}};
    const std::vector<std::vector<DType>> mixes_of_k_quants = {
        {DType::q4_k, DType::q4_k, DType::q6_k},
        {DType::bf16, DType::q8_0, DType::q6_k, DType::q3_k, DType::q5_k, DType::f32}};
    for (const std::vector<DType>& types :
         cols % kSuperGroupSize == 0 ? mixes_of_k_quants : mixes) {
      std::vector<StoredTensor> stored;
      std::vector<std::unique_ptr<Weight>> weights;
      std::vector<Buffer> outs;
      std::vector<Linear> linears;
      for (const DType dtype : types) {
        const int features = 100 + random.below(80);
        stored.push_back(random_matrix("w", dtype, features, cols, 0.1, random));
        weights.push_back(backend.load_weight(stored.back().view()));
        outs.push_back(backend.allocate(static_cast<std::size_t>(rows * features)));
        linears.push_back({weights.back().get(), nullptr, outs.back().get()});
      }
      begin_rows(backend, rows);
      backend.linear(gated ? Input{.x = x_buffer.get(), .up = up_buffer.get()}
                           : Input{x_buffer.get(), norm_buffer.get(), 1e-5f},
                     linears, false, {});
      for (std::size_t i = 0; i < types.size(); ++i) {
        const int features = weights[i]->rows();
        const auto values = values_of(stored[i]);
        std::vector<double> expected, tolerance;
        for (int row = 0; row < rows; ++row) {
          for (int feature = 0; feature < features; ++feature) {
            double sum = 0, size = 0;
            for (int k = 0; k < cols; ++k) {
              const double product = input[static_cast<std::size_t>(row * cols + k)] *
                                     values[static_cast<std::size_t>(feature * cols + k)];
              sum += product;
              size += std::abs(product);
            }
            expected.push_back(sum);
            tolerance.push_back(size * (rounding(types[i], cols) + 1e-5));
          }
        }
        CHECK_CLOSE(std::string(name(types[i])) + (gated ? ", gated" : ", normed"),
                    backend.download(outs[i].get(), expected.size()), expected, tolerance);
      }
    }
  }
}

// Rows as large or as small as float32 allows, and rows that are not numbers.
TEST(cuda_linear_takes_any_size_of_row_and_passes_on_what_is_not_finite) {
  CudaBackend backend(0);
  constexpr int features = 20;
  for (const DType dtype : kTypes) {
    Random random(3);
    const int cols = whole_blocks(dtype, 64);
    const auto stored = random_matrix("w", dtype, features, cols, 0.1, random);
    const auto weight = backend.load_weight(stored.view());
    const auto base = random.floats(static_cast<std::size_t>(cols), -1, 1);
    std::vector<float> x(static_cast<std::size_t>(5 * cols));
    const float factors[] = {1, 1e30f, 1e-30f, 3e5f, 0};
    for (int row = 0; row < 5; ++row) {
      for (int k = 0; k < cols; ++k) {
        x[static_cast<std::size_t>(row * cols + k)] =
            base[static_cast<std::size_t>(k)] * factors[row];
      }
    }
    const Case c{dtype, features, cols, 5, false, false};
    const std::vector<float> before(5 * features);
    const auto out = multiply(backend, *weight, c, x, {}, before);
    for (int i = 0; i < features; ++i) {
      for (int row = 1; row < 5; ++row) {
        const double expected =
            static_cast<double>(out[static_cast<std::size_t>(i)]) * factors[row];
        CHECK_NEAR(out[static_cast<std::size_t>(row * features + i)], expected,
                   std::abs(expected) * 1e-2 + 1e-3 * factors[row]);
      }
    }
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      auto damaged = x;
      damaged[static_cast<std::size_t>(cols + 37)] = bad;
      const auto passed_on = multiply(backend, *weight, c, damaged, {}, before);
      for (int i = 0; i < 5 * features; ++i) {
        CHECK_IN(where(c),
                 std::isfinite(passed_on[static_cast<std::size_t>(i)]) == (i / features != 1));
      }
    }
  }
}

TEST(cuda_embeddings_are_the_stored_rows) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) {
    for (const int cols : {whole_blocks(dtype, 32), 96, 128, 768}) {
      if (cols % values_per_block(dtype) != 0) continue;
      Random random(8);
      const auto table = random_matrix("token_embd.weight", dtype, 150, cols, 0.1, random);
      const auto values = values_of(table);
      const auto weight = backend.load_weight(table.view());
      const std::vector<TokenId> tokens = {149, 0, 16, 15, 128, 127};
      const std::vector<int> positions(tokens.size());
      backend.begin({tokens, positions, positions, {}}, {}, false);
      const Buffer out = backend.allocate(tokens.size() * static_cast<std::size_t>(cols));
      backend.embed(*weight, nullptr, out.get());
      std::vector<double> expected, tolerance;
      for (const TokenId token : tokens) {
        for (int k = 0; k < cols; ++k) {
          expected.push_back(values[static_cast<std::size_t>(token * cols + k)]);
          tolerance.push_back(std::abs(expected.back()) * kEps);
        }
      }
      CHECK_CLOSE(std::string(name(dtype)), backend.download(out.get(), expected.size()), expected,
                  tolerance);
    }
  }
}

TEST(cuda_weights_that_are_not_finite_are_named) {
  CudaBackend backend(0);
  for (const DType dtype : kTypes) {
    Random random(2);
    const auto whole =
        random_matrix("blk.3.attn_q.weight", dtype, 200, whole_blocks(dtype, 64), 0.1, random);
    backend.load_weight(whole.view());
    const std::size_t row_bytes = whole.bytes.size() / 200;
    std::uint16_t half = 0x7e01;
    if (dtype == DType::bf16 || dtype == DType::f32) half = 0x7fc1;
    const auto places = dtype == DType::f32 ? std::vector<std::size_t>{2} : halves_of(dtype);
    for (const std::size_t place : places) {
      StoredTensor tensor = whole;
      std::memcpy(tensor.bytes.data() + 170 * row_bytes + place, &half, 2);
      CHECK_THROWS_WITH(backend.load_weight(tensor.view()),
                        "tensor blk.3.attn_q.weight: row 170 holds NaN or infinity");
    }
  }
}

// What is said before anything is loaded, and near the file's size where the type is read as it is:
// six-bit scales get bytes, and rows whole blocks of 128.
TEST(cuda_weights_take_what_was_said) {
  CudaBackend backend(0);
  Random random(5);
  for (const DType dtype : kDTypes) {
    for (const auto& [rows, cols] : {std::pair{256, 1024}, {3, 256}, {129, 768}}) {
      const auto stored = random_matrix("w", dtype, rows, cols, 0.1, random);
      const auto weight = backend.load_weight(stored.view());
      const auto size = static_cast<double>(PackedWeight::of(*weight).size());
      CHECK_EQ(size, backend.weight_bytes(dtype, rows, cols));
      if (rows == 256 && !becomes_halves(dtype)) {
        const auto in_file = static_cast<double>(stored.bytes.size());
        CHECK_IN(std::string(name(dtype)), size >= in_file && size <= 1.03 * in_file);
      }
    }
  }
}

TEST(cuda_mix_joins_rows) {
  CudaBackend backend(0);
  constexpr int cols = 70;
  Random random(4);
  const auto x = random.floats(3 * cols, -1, 1);
  auto y = random.floats(3 * cols, -1, 1);
  y[2 * cols] = NAN;  // behind a coefficient of 0
  const Buffer bx = backend.upload(x), by = backend.upload(y), out = backend.allocate(2 * cols);
  begin_rows(backend, 2);
  const std::vector<Mix> mixes = {{2, 0.5f, 1, -2.0f}, {0, 3.0f, 2, 0.0f}};
  backend.mix(mixes, bx.get(), by.get(), cols, out.get());
  const auto sums = backend.download(out.get(), 2 * cols);
  for (std::size_t i = 0; i < cols; ++i) {
    CHECK_NEAR(sums[i], 0.5 * x[2 * cols + i] - 2.0 * y[cols + i], 1e-6);
    CHECK_NEAR(sums[cols + i], 3.0 * x[i], 1e-6);
  }
}

}  // namespace
}  // namespace sbd::cuda
