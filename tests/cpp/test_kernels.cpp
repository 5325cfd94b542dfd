// The small kernels of every table this CPU runs, against float64.
#include <cmath>

#include "backend/cpu/kernels.h"
#include "check.h"
#include "reference.h"

namespace sbd::cpu {
namespace {

using namespace test;

const int kLengths[] = {1, 2, 15, 16, 17, 31, 32, 33, 100, 1024};

std::string place(const Kernels* kernels, int n) {
  return std::string(kernels->name) + ", n " + std::to_string(n);
}

TEST(the_isa_table_is_complete_and_ends_with_the_scalar_one) {
  const auto tables = all_kernels();
  CHECK(!tables.empty() && std::string(tables.back()->name) == "scalar");
  for (const Kernels* kernels : tables) {
    const ForcedIsa forced(kernels->name);
    CHECK(&select_kernels() == kernels);
  }
  const ForcedIsa forced("sse9");
  CHECK_THROWS_WITH(select_kernels(), "SBD_ISA=sse9: unknown instruction set, expected one of");
}

TEST_ON_EVERY_ISA(kernels_exp) {
  for (const Kernels* kernels : tested_kernels()) {
    const auto exp = [&](float x) { return kernels->exp_sum(&x, 1, 0.0f, 1.0f); };
    CHECK_EQ(exp(0.0f), 1.0f);
    for (const float x : {-87.01f, -100.0f, -1e4f, kMinusInfinity, -INFINITY}) {
      CHECK_EQ(exp(x), 0.0f);
    }
    double worst = 0;
    Random random(1);
    for (int i = 0; i < 200000; ++i) {
      const auto x = static_cast<float>(random.uniform(-87, 88));
      const double expected = std::exp(static_cast<double>(x));
      const double error = std::abs(exp(x) - expected) / expected;
      worst = error <= worst ? worst : error;  // a NaN stays
    }
    CHECK_IN(place(kernels, 1) + ": " + show(worst), worst < 2e-7);
    CHECK(std::isnan(exp(NAN)));
  }
}

TEST_ON_EVERY_ISA(kernels_exp_sum) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const int n : kLengths) {
      Random random(static_cast<std::uint64_t>(n));
      const std::vector<float> x = random.floats(static_cast<std::size_t>(n), -30, 5);
      const float scale = 0.7f;
      double expected = 0;
      double tolerance = 0;
      for (const float v : x) {
        const double scaled = (static_cast<double>(v) - 5) * scale;
        expected += std::exp(scaled);
        tolerance += std::exp(scaled) * (2e-7 + (3 * std::abs(scaled) + n) * kEps);
      }
      CHECK_NEAR(kernels->exp_sum(x.data(), n, 5.0f, scale), expected, tolerance);
    }
  }
}

TEST_ON_EVERY_ISA(kernels_rms_norm) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const int n : kLengths) {
      Random random(static_cast<std::uint64_t>(n));
      const auto size = static_cast<std::size_t>(n);
      const std::vector<float> x = random.floats(size, -3, 4);
      const std::vector<float> weight = random.floats(size, 0.5, 2);
      double squares = 0;
      for (const float v : x) squares += static_cast<double>(v) * v;
      std::vector<double> expected, tolerance;
      for (std::size_t i = 0; i < size; ++i) {
        expected.push_back(weight[i] * x[i] / std::sqrt(squares / n + 1e-5));
        tolerance.push_back(std::abs(expected[i]) * (n / 16 + 12) * kEps);
      }
      std::vector<float> out(size + 1, kGuard);
      kernels->rms_norm(x.data(), weight.data(), 1e-5f, n, out.data());
      CHECK_CLOSE(place(kernels, n), std::span(out).first(size), expected, tolerance);
      CHECK_EQ(out[size], kGuard);
      std::vector<float> in_place = x;
      kernels->rms_norm(in_place.data(), weight.data(), 1e-5f, n, in_place.data());
      CHECK_IN(place(kernels, n), same_bits(in_place.data(), out.data(), size));
    }
    // eps alone holds a row of zeros
    const std::vector<float> zeros(16, 0.0f), ones(16, 1.0f);
    std::vector<float> out(16, kGuard);
    kernels->rms_norm(zeros.data(), ones.data(), 1e-6f, 16, out.data());
    CHECK(same_bits(out.data(), zeros.data(), 16));
  }
}

TEST_ON_EVERY_ISA(kernels_swiglu) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const int n : kLengths) {
      Random random(static_cast<std::uint64_t>(n));
      const auto size = static_cast<std::size_t>(n);
      std::vector<float> gate = random.floats(size, -30, 30);
      gate[0] = -80.0f;
      const std::vector<float> up = random.floats(size, -2, 2);
      std::vector<double> expected, tolerance;
      for (std::size_t i = 0; i < size; ++i) {
        const double g = gate[i];
        expected.push_back(g / (1 + std::exp(-g)) * up[i]);
        tolerance.push_back(std::abs(expected[i]) * (2e-7 + 6 * kEps));
      }
      std::vector<float> out(size + 1, kGuard);
      kernels->swiglu(gate.data(), up.data(), n, out.data());
      CHECK_CLOSE(place(kernels, n), std::span(out).first(size), expected, tolerance);
      CHECK_EQ(out[size], kGuard);
    }
    // Far out, where exp(-gate) leaves the range: no NaN, no infinity.
    float gate[] = {-1e4f, -200.0f, 200.0f, 1e4f};
    const float up[] = {1.0f, 1.0f, 1.0f, 1.0f};
    kernels->swiglu(gate, up, 4, gate);
    CHECK_NEAR(gate[0], 0, 1e-30);
    CHECK_NEAR(gate[1], 0, 1e-30);
    CHECK_NEAR(gate[2], 200, 1e-4);
    CHECK_NEAR(gate[3], 1e4, 1e-2);
  }
}

TEST_ON_EVERY_ISA(kernels_rotate) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const bool interleaved : {false, true}) {
      for (const int dim : {2, 8, 16, 24, 64, 80, 128}) {
        Random random(static_cast<std::uint64_t>(dim));
        const auto half = static_cast<std::size_t>(dim) / 2;
        const std::vector<float> x = random.floats(2 * half, -2, 2);
        const std::vector<float> cos = random.floats(half, -1, 1);
        const std::vector<float> sin = random.floats(half, -1, 1);
        std::vector<double> expected(2 * half), tolerance(2 * half);
        for (std::size_t i = 0; i < half; ++i) {
          const std::size_t a = interleaved ? 2 * i : i;
          const std::size_t b = interleaved ? 2 * i + 1 : i + half;
          expected[a] = static_cast<double>(x[a]) * cos[i] - static_cast<double>(x[b]) * sin[i];
          expected[b] = static_cast<double>(x[a]) * sin[i] + static_cast<double>(x[b]) * cos[i];
          tolerance[a] = tolerance[b] = 8 * 3 * kEps;
        }
        std::vector<float> out = x;
        kernels->rotate(out.data(), cos.data(), sin.data(), dim, interleaved);
        CHECK_CLOSE(place(kernels, dim), out, expected, tolerance);
      }
    }
  }
}

TEST_ON_EVERY_ISA(kernels_quantize) {
  for (const Kernels* kernels : tested_kernels()) {
    constexpr int groups = 9;
    Random random(5);
    std::vector<float> x = random.floats(groups * 32, -2, 2);
    for (int i = 0; i < 32; ++i) {
      x[32 + i] = 0.0f;                    // group 1: zeros
      x[64 + i] *= 1e-38f;                 // group 2: around the smallest normals
      x[96 + i] = i % 2 ? 3e38f : -3e38f;  // group 3: the largest
      x[128 + i] = 127.0f * (i % 2 ? 1.0f : -1.0f);
      x[160 + i] = i == 7 ? -1e30f : 0.001f;  // group 5: one huge value, alone in its scale
      x[192 + i] = static_cast<float>(i) + 0.5f;
      x[224 + i] *= 1e-42f;  // group 7: subnormals
    }
    x[192] = 127.0f;  // scale 1: the others are ties, to even
    std::vector<QuantizedGroup> out(groups + 1);
    out[groups].scale = kGuard;
    kernels->quantize(x.data(), groups * 32, out.data());
    for (int g = 0; g < groups; ++g) {
      const QuantizedGroup& group = out[g];
      float top = 0;
      std::vector<float> restored;
      std::vector<double> expected, tolerance;
      int sums[2] = {};
      for (int i = 0; i < 32; ++i) {
        top = std::max(top, std::abs(x[g * 32 + i]));
        CHECK(group.quants[i] >= -127);
        sums[i / 16] += group.quants[i];
        restored.push_back(static_cast<float>(group.quants[i] * static_cast<double>(group.scale)));
        expected.push_back(x[g * 32 + i]);
      }
      // Half a step, and the roundings of scale and quotient; a whole group below 1e-36 may be 0.
      for (int i = 0; i < 32; ++i) tolerance.push_back(top / 127.0 * (0.5 + 400 * kEps) + 1e-36);
      CHECK_CLOSE(place(kernels, g), restored, expected, tolerance);
      CHECK_NEAR(group.scale, top / 127.0, top / 127.0 * 2 * kEps + 0x1p-149);
      CHECK_EQ(group.sums[0], sums[0]);
      CHECK_EQ(group.sums[1], sums[1]);
      CHECK_EQ(group.minus_128_sum, -128 * (sums[0] + sums[1]));
      CHECK_EQ(group.minus_sum, -group.scale * static_cast<float>(sums[0] + sums[1]));
    }
    for (int i = 1; i < 32; ++i) CHECK_EQ(out[6].quants[i], i % 2 == 0 ? i : i + 1);
    CHECK_EQ(out[groups].scale, kGuard);
  }
}

TEST_ON_EVERY_ISA(kernels_quantize_keeps_what_is_not_finite) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      for (int at = 0; at < 32; ++at) {  // in whichever lane it stands
        std::vector<float> x(32, 1.0f);
        x[at] = bad;
        QuantizedGroup group;
        kernels->quantize(x.data(), 32, &group);
        CHECK_IN(place(kernels, at), !std::isfinite(group.scale));
      }
    }
  }
}

TEST_ON_EVERY_ISA(kernels_to_half_gives_back_every_half) {
  for (const Kernels* kernels : tested_kernels()) {
    std::vector<float> x;
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
      x.push_back(static_cast<float>(half_value(static_cast<std::uint16_t>(bits))));
    }
    std::vector<std::uint16_t> out(x.size());
    kernels->to_half(x.data(), static_cast<int>(x.size()), out.data());
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
      if (std::isnan(x[bits])) {
        CHECK(std::isnan(half_value(out[bits])));
      } else {
        CHECK_EQ(out[bits], bits);
      }
    }
  }
}

// Values at, just below and just above the middle between neighbours of a 16-bit format.
std::vector<float> tricky_values(double (*value)(std::uint16_t), std::uint16_t infinity) {
  std::vector<float> x = {0.0f,       -0.0f,    0x1p-149f, -0x1p-149f, 0x1.fffffep127f,
                          65519.996f, 65520.0f, 1e5f,      INFINITY,   -INFINITY};
  for (std::uint16_t bits = 0; bits < infinity; bits = static_cast<std::uint16_t>(bits + 7)) {
    const double low = value(bits);
    const double high = value(static_cast<std::uint16_t>(bits + 1));
    if (!std::isfinite(high)) continue;
    const auto middle = static_cast<float>((low + high) / 2);
    for (const float v : {middle, std::nextafterf(middle, 0.0f), std::nextafterf(middle, 1e38f)}) {
      x.push_back(v);
      x.push_back(-v);
    }
  }
  return x;
}

TEST_ON_EVERY_ISA(kernels_round_to_the_nearest_half_and_bf16) {
  struct Format {
    void (*const Kernels::*convert)(const float*, int, std::uint16_t*);
    double (*value)(std::uint16_t);
    double (*round)(double);
    std::uint16_t infinity;
  };
  const Format formats[] = {{&Kernels::to_half, half_value, rounded_to_half, 0x7c00},
                            {&Kernels::to_bf16, bf16_value, rounded_to_bf16, 0x7f80}};
  for (const Kernels* kernels : tested_kernels()) {
    for (const Format& format : formats) {
      const std::vector<float> x = tricky_values(format.value, format.infinity);
      std::vector<std::uint16_t> out(x.size() + 1, 0x1234);
      (kernels->*format.convert)(x.data(), static_cast<int>(x.size()), out.data());
      for (std::size_t i = 0; i < x.size(); ++i) {
        CHECK_EQ(format.value(out[i]), format.round(x[i]));
        CHECK_EQ(out[i] >> 15 != 0, std::signbit(x[i]));
      }
      CHECK_EQ(out[x.size()], 0x1234);
      for (int n = 1; n < 20; ++n) {  // tails
        std::vector<std::uint16_t> tail(static_cast<std::size_t>(n) + 1, 0x1234);
        (kernels->*format.convert)(x.data() + 10, n, tail.data());
        CHECK(std::equal(tail.begin(), tail.end() - 1, out.begin() + 10) && tail.back() == 0x1234);
      }
      const float nan = NAN;
      std::uint16_t stored = 0;
      (kernels->*format.convert)(&nan, 1, &stored);
      CHECK(std::isnan(format.value(stored)));
    }
  }
}

TEST_ON_EVERY_ISA(kernels_run_stats) {
  for (const Kernels* kernels : tested_kernels()) {
    for (const int n : {16, 32, 48, 512}) {
      for (const double spread : {0.0, 0.5, 5.0, 80.0}) {
        Random random(static_cast<std::uint64_t>(n));
        std::vector<float> x = random.floats(static_cast<std::size_t>(n), -spread, spread);
        x[random.below(n)] =
            *std::max_element(x.begin(), x.end());  // two share the highest, mostly
        double top = -INFINITY, second = -INFINITY, sum = 0, weighted = 0;
        int argmax = -1;
        for (int i = 0; i < n; ++i) {
          if (x[i] > top) {
            second = top;
            top = x[i];
            argmax = i;
          } else if (x[i] > second) {
            second = x[i];
          }
        }
        for (const float v : x) {
          sum += std::exp(v - top);
          weighted += (v - top) * std::exp(v - top);
        }
        RunStats stats;
        kernels->run_stats(x.data(), n, &stats);
        CHECK_EQ(stats.max, top);
        CHECK_EQ(stats.second, second);
        CHECK_EQ(stats.argmax, argmax);
        CHECK_EQ(stats.not_finite, 0.0f);
        const double relative = 2e-7 + (n / 16 + 8 + spread) * kEps;
        CHECK_NEAR(stats.sum, sum, sum * relative);
        CHECK_NEAR(stats.weighted_sum, weighted, (std::abs(weighted) + 1e-30) * relative);
        for (const float bad : {NAN, INFINITY, -INFINITY}) {
          std::vector<float> damaged = x;
          damaged[random.below(n)] = bad;
          kernels->run_stats(damaged.data(), n, &stats);
          CHECK_IN(place(kernels, n), std::isnan(stats.not_finite));
        }
      }
    }
  }
}

// The two highest in one lane of 16, whichever comes first.
TEST_ON_EVERY_ISA(kernels_run_stats_finds_the_second_wherever_it_is) {
  for (const Kernels* kernels : tested_kernels()) {
    for (int first = 0; first < 64; ++first) {
      for (int second = 0; second < 64; ++second) {
        if (first == second) continue;
        std::vector<float> x(64, 1.0f);
        x[first] = 3.0f;
        x[second] = 2.0f;
        RunStats stats;
        kernels->run_stats(x.data(), 64, &stats);
        CHECK(stats.argmax == first && stats.max == 3.0f && stats.second == 2.0f);
      }
    }
  }
}

TEST_ON_EVERY_ISA(kernels_read_all_bytes) {
  for (const Kernels* kernels : tested_kernels()) {
    std::vector<std::uint8_t> bytes(4096, 0);
    const std::uint64_t nothing = kernels->peak_read(bytes.data(), 4096);
    for (const std::size_t at : {0, 1024, 4092}) {  // the first byte of a lane counts
      bytes[at] = 200;
      CHECK(kernels->peak_read(bytes.data(), 4096) != nothing);
      bytes[at] = 0;
    }
  }
}

}  // namespace
}  // namespace sbd::cpu
