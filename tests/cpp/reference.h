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
inline double rounded(double x, int mantissa_bits, int lowest, int highest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), lowest) - mantissa_bits);
  const double result = std::nearbyint(x / unit) * unit;
  return std::abs(result) < std::ldexp(1.0, highest + 1) ? result : std::copysign(INFINITY, x);
}
inline double rounded_to_half(double x) { return rounded(x, 10, -14, 15); }
inline double rounded_to_bf16(double x) { return rounded(x, 7, -126, 127); }

inline constexpr DType kCacheTypes[] = {DType::f32, DType::f16, DType::bf16};

// To a type of caches; a float stays what it is.
inline double rounded_to(DType dtype, double x) {
  return dtype == DType::f16 ? rounded_to_half(x) : dtype == DType::bf16 ? rounded_to_bf16(x) : x;
}
// Q8_0's, of 32 neighbours: quants by the scale as float32 has it, of which a half is kept.
inline std::vector<double> rounded_to(DType dtype, const std::vector<float>& x) {
  std::vector<double> result(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (dtype != DType::q8_0) {
      result[i] = rounded_to(dtype, static_cast<double>(x[i]));
      continue;
    }
    float top = 0;
    for (std::size_t j = i / 32 * 32; j < i / 32 * 32 + 32; ++j)
      top = std::max(top, std::abs(x[j]));
    result[i] = rounded_to_half(top / 127.0f) * std::nearbyint(x[i] * (127.0f / top));
  }
  return result;
}
// What that is off by at most, as a share of it; in Q8_0 of the largest of its group.
inline double rounding(DType dtype) {
  return dtype == DType::q8_0   ? 0.5 / 127 + 0x1p-11
         : dtype == DType::f16  ? 0x1p-11
         : dtype == DType::bf16 ? 0x1p-8
                                : 0;
}

// The value of stored bits: sign, exponent, mantissa.
inline double bits_value(std::uint32_t bits, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double sign = bits >> (mantissa_bits + exponent_bits) & 1u ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1u << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}
inline double half_value(std::uint16_t bits) { return bits_value(bits, 10, 5); }
inline double bf16_value(std::uint16_t bits) { return bits_value(bits, 7, 8); }

// Stands behind an output, and must still stand there after.
inline constexpr float kGuard = 12345.0f;

class Random {
 public:
  explicit Random(std::uint64_t seed) : bits_(seed) {}
  std::uint64_t bits() { return bits_(); }
  int below(int n) { return static_cast<int>(bits_() % static_cast<std::uint64_t>(n)); }
  double uniform(double low, double high) {
    return low + (high - low) * std::ldexp(static_cast<double>(bits_() >> 11), -53);
  }
  std::vector<float> floats(std::size_t n, double low, double high) {
    std::vector<float> result(n);
    for (float& x : result) x = static_cast<float>(uniform(low, high));
    return result;
  }

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

template <typename T>
void append(std::vector<std::byte>& bytes, T value) {
  const auto* p = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), p, p + sizeof value);
}

inline StoredTensor f32_tensor(std::string name, std::vector<std::int64_t> shape,
                               std::span<const float> values) {
  StoredTensor tensor{std::move(name), DType::f32, std::move(shape), {}};
  for (const float value : values) append(tensor.bytes, value);
  return tensor;
}

// Values of about `size`: random signs and mantissas, quants over their whole range.
inline StoredTensor random_matrix(std::string name, DType dtype, int rows, int cols, double size,
                                  Random& random) {
  StoredTensor tensor{std::move(name), dtype, {rows, cols}, {}};
  const int exponent = std::ilogb(size);
  const auto float_bits = [&](int mantissa_bits, int bias) {
    const int e = std::max(0, exponent + bias - random.below(3));  // at 0: subnormal
    return static_cast<std::uint64_t>(e) << mantissa_bits |
           (random.bits() & ((1ull << mantissa_bits) - 1));
  };
  const auto half = [&](int range) {  // of what is multiplied by up to 2^range
    const std::uint64_t sign = random.bits() & 1u;
    const auto stored = static_cast<std::uint16_t>(sign << 15 | float_bits(10, 15 - range));
    append(tensor.bytes, stored);
    return stored;
  };
  const auto bytes = [&](int n) {
    for (; n > 0; --n) append(tensor.bytes, static_cast<std::uint8_t>(random.bits()));
  };
  const int blocks = rows * cols / values_per_block(dtype);
  // A min is 2^powers as large as the scale, so that values lie around 0.
  const auto scale_and_min = [&](int range, int powers, bool opposite) {
    const int scale = half(range) ^ (opposite ? 0x8000 : 0);
    append(tensor.bytes, static_cast<std::uint16_t>(scale + (powers << 10)));
  };
  for (int i = 0; i < blocks; ++i) {
    switch (dtype) {
      case DType::f32: append(tensor.bytes, static_cast<float>(random.uniform(-size, size))); break;
      case DType::f16: half(0); break;
      case DType::bf16: {
        const std::uint64_t sign = random.bits() & 1u;
        append(tensor.bytes, static_cast<std::uint16_t>(sign << 15 | float_bits(7, 127)));
        break;
      }
      case DType::q8_0: half(7), bytes(32); break;
      case DType::q4_0: half(3), bytes(16); break;
      case DType::q4_1: scale_and_min(3, 3, true), bytes(16); break;
      case DType::q5_0: half(4), bytes(4 + 16); break;
      case DType::q5_1: scale_and_min(4, 4, true), bytes(4 + 16); break;
      case DType::iq4_nl: half(7), bytes(16); break;
      case DType::q2_k: bytes(16 + 64), scale_and_min(5, 1, false); break;
      case DType::q3_k: bytes(32 + 64 + 12), half(7); break;
      case DType::q4_k: scale_and_min(10, 3, false), bytes(12 + 128); break;
      case DType::q5_k: scale_and_min(11, 4, false), bytes(12 + 32 + 128); break;
      case DType::q6_k: bytes(128 + 64 + 16), half(12); break;
      case DType::iq4_xs: half(12), bytes(2 + 4 + 128); break;
    }
  }
  return tensor;
}

// Where a quantised type's block has numbers in half precision.
inline std::vector<std::size_t> halves_of(DType dtype) {
  switch (dtype) {
    case DType::q2_k: return {80, 82};
    case DType::q3_k: return {108};
    case DType::q6_k: return {208};
    case DType::q4_1:
    case DType::q5_1:
    case DType::q4_k:
    case DType::q5_k: return {0, 2};
    default: return {0};
  }
}

// GGUF's blocks: Q8_0 is a half scale and 32 int8; Q4_0 a half scale and 16 bytes whose low nibbles
// are weights 0-15 and high nibbles 16-31, each minus 8; Q4_1 has a half m behind the scale, which
// is added to the product instead. Q5_0 and Q5_1 have 32 bits of quants behind that, lowest first,
// worth 16, and Q5_0 subtracts 16. IQ4_NL is Q4_0 with levels of a table.
// Q4_K: halves d and m, then for each of eight groups of 32 a scale s and an offset o of six bits
// in 12 bytes, then 128 bytes of nibbles, 32 for two groups, whose first has the low ones:
// d s q - m o. Q5_K has 32 bytes before the nibbles, whose bit g is worth 16 in group g.
// Q2_K: for each of 16 weights a byte of a scale s and an offset o of four bits, then two bits a
// weight, 32 bytes for 128 weights, lowest first, then halves d and m: d s q - m o.
// Q3_K: 32 bytes of bits worth 4, byte i % 32 and bit i / 32; two bits as in Q2_K; scales of six
// bits in 12 bytes, then a half d: d (s - 32) (q - 4). IQ4_XS: a half d, 16 bits with the high two
// of eight scales, 4 bytes with their low four, then 16 bytes of nibbles for each group, as IQ4_NL:
// d (s - 32) level. Q6_K: 128 bytes of low nibbles, 64 bytes of two high bits, an int8 scale s for
// each 16 weights, a half d: d s (q - 32). Each half block has 64 bytes of nibbles (low ones first)
// and 32 bytes of high bits (lowest first).
inline double iq4_level(int nibble) {
  constexpr int kLevels[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                             1,    13,   25,  38,  53,  69,  89,  113};
  return kLevels[nibble];
}

inline std::vector<double> values_of(const StoredTensor& tensor) {
  std::vector<double> values;
  const std::byte* p = tensor.bytes.data();
  const auto take = [&](auto value) {
    std::memcpy(&value, p, sizeof value);
    p += sizeof value;
    return value;
  };
  while (p < tensor.bytes.data() + tensor.bytes.size()) {
    switch (tensor.dtype) {
      case DType::f32: values.push_back(take(float{})); break;
      case DType::f16: values.push_back(half_value(take(std::uint16_t{}))); break;
      case DType::bf16: values.push_back(bf16_value(take(std::uint16_t{}))); break;
      case DType::q8_0: {
        const double scale = half_value(take(std::uint16_t{}));
        for (int i = 0; i < 32; ++i) values.push_back(scale * take(std::int8_t{}));
        break;
      }
      case DType::q4_0: {
        const double scale = half_value(take(std::uint16_t{}));
        int bytes[16];
        for (int& byte : bytes) byte = take(std::uint8_t{});
        for (const int byte : bytes) values.push_back(scale * (byte % 16 - 8));
        for (const int byte : bytes) values.push_back(scale * (byte / 16 - 8));
        break;
      }
      case DType::q4_1: {
        const double d = half_value(take(std::uint16_t{}));
        const double m = half_value(take(std::uint16_t{}));
        int bytes[16];
        for (int& byte : bytes) byte = take(std::uint8_t{});
        for (const int byte : bytes) values.push_back(d * (byte % 16) + m);
        for (const int byte : bytes) values.push_back(d * (byte / 16) + m);
        break;
      }
      case DType::q5_0:
      case DType::q5_1: {
        const double d = half_value(take(std::uint16_t{}));
        const double m = tensor.dtype == DType::q5_1 ? half_value(take(std::uint16_t{})) : -16 * d;
        const auto highs = take(std::uint32_t{});
        int bytes[16];
        for (int& byte : bytes) byte = take(std::uint8_t{});
        for (int i = 0; i < 32; ++i) {
          const int low = i < 16 ? bytes[i] % 16 : bytes[i - 16] / 16;
          values.push_back(d * (low + static_cast<int>(highs >> i & 1u) * 16) + m);
        }
        break;
      }
      case DType::iq4_nl: {
        const double d = half_value(take(std::uint16_t{}));
        int bytes[16];
        for (int& byte : bytes) byte = take(std::uint8_t{});
        for (const int byte : bytes) values.push_back(d * iq4_level(byte % 16));
        for (const int byte : bytes) values.push_back(d * iq4_level(byte / 16));
        break;
      }
      case DType::iq4_xs: {
        const double d = half_value(take(std::uint16_t{}));
        const int high = take(std::uint16_t{});
        int low[4], q[128];
        for (int& byte : low) byte = take(std::uint8_t{});
        for (int& byte : q) byte = take(std::uint8_t{});
        for (int i = 0; i < 256; ++i) {
          const int g = i / 32;
          const int s = (g % 2 ? low[g / 2] / 16 : low[g / 2] % 16) + (high >> (2 * g)) % 4 * 16;
          const int byte = q[g * 16 + i % 16];
          values.push_back(d * (s - 32) * iq4_level(i % 32 < 16 ? byte % 16 : byte / 16));
        }
        break;
      }
      case DType::q2_k: {
        int scales[16], twos[64];
        for (int& byte : scales) byte = take(std::uint8_t{});
        for (int& byte : twos) byte = take(std::uint8_t{});
        const double d = half_value(take(std::uint16_t{}));
        const double m = half_value(take(std::uint16_t{}));
        for (int i = 0; i < 256; ++i) {
          const int q = twos[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
          values.push_back(d * (scales[i / 16] % 16) * q - m * (scales[i / 16] / 16));
        }
        break;
      }
      case DType::q3_k: {
        int highs[32], twos[64], six[12];
        for (int& byte : highs) byte = take(std::uint8_t{});
        for (int& byte : twos) byte = take(std::uint8_t{});
        for (int& byte : six) byte = take(std::uint8_t{});
        const double d = half_value(take(std::uint16_t{}));
        for (int i = 0; i < 256; ++i) {
          const int g = i / 16;
          const int low = g < 8 ? six[g] % 16 : six[g - 8] / 16;
          const int s = low + (six[8 + g % 4] >> (g / 4 * 2)) % 4 * 16;
          const int q = (twos[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3) +
                        (highs[i % 32] >> (i / 32)) % 2 * 4;
          values.push_back(d * (s - 32) * (q - 4));
        }
        break;
      }
      case DType::q4_k:
      case DType::q5_k: {
        const double d = half_value(take(std::uint16_t{}));
        const double m = half_value(take(std::uint16_t{}));
        int six[12], highs[32] = {}, q[128];
        for (int& byte : six) byte = take(std::uint8_t{});
        for (int& byte : highs) {
          if (tensor.dtype == DType::q5_k) byte = take(std::uint8_t{});
        }
        for (int& byte : q) byte = take(std::uint8_t{});
        for (int i = 0; i < 256; ++i) {
          const int g = i / 32;
          const int s = g < 4 ? six[g] % 64 : six[g + 4] % 16 + six[g - 4] / 64 * 16;
          const int o = g < 4 ? six[g + 4] % 64 : six[g + 4] / 16 + six[g] / 64 * 16;
          const int byte = q[g / 2 * 32 + i % 32];
          const int high = (highs[i % 32] >> g) % 2 * 16;
          values.push_back(d * s * ((g % 2 ? byte / 16 : byte % 16) + high) - m * o);
        }
        break;
      }
      case DType::q6_k: {
        int lows[128], highs[64], scales[16];
        for (int& byte : lows) byte = take(std::uint8_t{});
        for (int& byte : highs) byte = take(std::uint8_t{});
        for (int& byte : scales) byte = take(std::int8_t{});
        const double d = half_value(take(std::uint16_t{}));
        for (int i = 0; i < 256; ++i) {
          const int in_half = i % 128;
          const int byte = lows[i / 128 * 64 + in_half % 64];
          const int low = in_half < 64 ? byte % 16 : byte / 16;
          const int high = highs[i / 128 * 32 + i % 32] >> (in_half / 32 * 2) & 3;
          values.push_back(d * scales[i / 16] * (low + 16 * high - 32));
        }
        break;
      }
    }
  }
  return values;
}

// The first place where |actual - expected| <= tolerance does not hold, in words; "" where there is
// none. A NaN anywhere is such a place.
inline std::string mismatch(std::span<const float> actual, std::span<const double> expected,
                            std::span<const double> tolerance) {
  if (actual.size() != expected.size() || actual.size() != tolerance.size()) return "sizes differ";
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (!(std::abs(actual[i] - expected[i]) <= tolerance[i])) {
      return "[" + std::to_string(i) + "] is " + show(actual[i]) + ", expected " +
             show(expected[i]) + " +- " + show(tolerance[i]);
    }
  }
  return "";
}

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

inline const std::string kAskedIsa = [] {
  const char* name = std::getenv("SBD_ISA");
  return name != nullptr ? name : "";
}();

// Of this CPU, the fastest first.
inline std::vector<const cpu::Kernels*> all_kernels() {
  std::vector<const cpu::Kernels*> tables;
  for (int i = 0; cpu::supported_kernels(i) != nullptr; ++i) {
    tables.push_back(cpu::supported_kernels(i));
  }
  return tables;
}

// All of them, or the one that SBD_ISA named before a test did: another run has the others.
inline std::vector<const cpu::Kernels*> tested_kernels() {
  asked_for_every_isa = true;
  std::vector<const cpu::Kernels*> tables = all_kernels();
  if (!kAskedIsa.empty()) {
    std::erase_if(tables, [](const cpu::Kernels* table) { return table->name != kAskedIsa; });
  }
  return tables;
}

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
