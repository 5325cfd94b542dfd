// What the kernels' tests share: number formats worked out from their definitions in float64,
// random tensors in every type, a comparison that NaN fails, and the list of the kernel tables to
// test.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/cpu/kernels.h"
#include "check.h"
#include "core/batch.h"
#include "core/dtype.h"
#include "core/tensor.h"

namespace sbd::test {

inline constexpr double kEps = 0x1p-24;  // half a unit in the last place of a float32 in [1, 2)

// The shortest row of at least 64 values.
constexpr int short_row(DType dtype) { return std::max(64, values_per_block(dtype)); }

// A number of `mantissa_bits` stored bits with exponents from `lowest` to `highest`: the nearest to
// x, ties to even, subnormals below 2^lowest, infinity from halfway beyond the highest on.
double rounded(double x, int mantissa_bits, int lowest, int highest);
inline double rounded_to_half(double x) { return rounded(x, 10, -14, 15); }
inline double rounded_to_bf16(double x) { return rounded(x, 7, -126, 127); }

inline constexpr DType kCacheTypes[] = {DType::f32, DType::f16, DType::bf16};

// To a type of caches; a float stays what it is.
inline double rounded_to(DType dtype, double x) {
  return dtype == DType::f16 ? rounded_to_half(x) : dtype == DType::bf16 ? rounded_to_bf16(x) : x;
}
// Q8_0's, of 32 neighbours: quants by the scale as float32 has it, of which a half is kept.
std::vector<double> rounded_to(DType dtype, const std::vector<float>& x);
// What that is off by at most, as a share of it; in Q8_0 of the largest of its group.
inline double rounding(DType dtype) {
  return dtype == DType::q8_0   ? 0.5 / 127 + 0x1p-11
         : dtype == DType::f16  ? 0x1p-11
         : dtype == DType::bf16 ? 0x1p-8
                                : 0;
}

// The value of stored bits: sign, exponent, mantissa.
double bits_value(std::uint32_t bits, int mantissa_bits, int exponent_bits);
inline double half_value(std::uint16_t bits) { return bits_value(bits, 10, 5); }
inline double bf16_value(std::uint16_t bits) { return bits_value(bits, 7, 8); }

// Stands behind an output, and must still stand there after.
inline constexpr float kGuard = 12345.0f;

class Random {
 public:
  explicit Random(std::uint64_t seed) : bits_(seed) {}
  std::uint64_t bits();
  int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }
  double uniform(double low, double high);
  std::vector<float> floats(std::size_t n, double low, double high);

 private:
  std::mt19937_64 bits_;
};

// A tensor with its bytes, as it stands in a file.
struct StoredTensor {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;

  Tensor view() const { return {name, dtype, shape, bytes}; }
};

StoredTensor f32_tensor(std::string name, std::vector<std::int64_t> shape,
                        std::span<const float> values);

// Values of about `size`: random signs and mantissas, quants over their whole range.
StoredTensor random_matrix(std::string name, DType dtype, int rows, int cols, double size,
                           Random& random);

// Where a quantised type's block has numbers in half precision.
std::vector<std::size_t> halves_of(DType dtype);

// A tensor's weights, by the definition of its type.
std::vector<double> values_of(const StoredTensor& tensor);

// The first place where |actual - expected| <= tolerance does not hold, in words; "" where there is
// none. A NaN anywhere is such a place.
std::string mismatch(std::span<const float> actual, std::span<const double> expected,
                     std::span<const double> tolerance);

// Probabilities after temperature, top-k, top-p and min-p, by sorting and cutting.
template <typename T>
std::vector<double> filtered(const std::vector<T>& logits, const Sampling& sampling) {
  const std::size_t n = logits.size();
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  std::vector<double> p(n);
  for (std::size_t i = 0; i < n; ++i) {
    p[i] = std::exp((static_cast<double>(logits[i]) - logits[order[0]]) / sampling.temperature);
  }
  const auto keep = [&](std::size_t count) {
    for (std::size_t i = count; i < n; ++i) p[order[i]] = 0;
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& x : p) x /= sum;
  };
  keep(sampling.top_k > 0 ? std::min(n, static_cast<std::size_t>(sampling.top_k)) : n);
  double mass = 0;
  std::size_t count = 0;
  while (count < n && (count == 0 || mass < sampling.top_p)) mass += p[order[count++]];
  while (count > 1 && p[order[count - 1]] < sampling.min_p * p[order[0]]) --count;
  keep(count);
  return p;
}

inline bool same_bits(const float* a, const float* b, std::size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}

// Of this CPU, the fastest first.
std::vector<const cpu::Kernels*> all_kernels();

// All of them, or the one that SBD_ISA named before a test did: another run has the others.
std::vector<const cpu::Kernels*> tested_kernels();

// While it lives, backends that are made take this kernel table.
class ForcedIsa {
 public:
  explicit ForcedIsa(const char* name) {
    const char* before = std::getenv("SBD_ISA");
    if (before != nullptr) before_ = before;
    setenv("SBD_ISA", name, 1);
  }
  ~ForcedIsa() { before_.empty() ? unsetenv("SBD_ISA") : setenv("SBD_ISA", before_.c_str(), 1); }
  ForcedIsa(const ForcedIsa&) = delete;
  ForcedIsa& operator=(const ForcedIsa&) = delete;

 private:
  std::string before_;
};

}  // namespace sbd::test

// `where` says which case it was; it is evaluated only on failure.
#define CHECK_IN(where, ...)                                                          \
  do {                                                                                \
    if (!(__VA_ARGS__)) {                                                             \
      sbd::test::report(__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ") in " + (where)); \
    }                                                                                 \
  } while (false)

#define CHECK_CLOSE(where, actual, expected, tolerance)                                    \
  do {                                                                                     \
    const std::string difference = sbd::test::mismatch((actual), (expected), (tolerance)); \
    if (!difference.empty()) {                                                             \
      sbd::test::report(__FILE__, __LINE__, #actual + difference + " in " + (where));      \
    }                                                                                      \
  } while (false)
