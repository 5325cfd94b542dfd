#include "reference.h"

namespace sbd::test {

double rounded(double x, int mantissa_bits, int lowest, int highest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), lowest) - mantissa_bits);
  const double result = std::nearbyint(x / unit) * unit;
  return std::abs(result) < std::ldexp(1.0, highest + 1) ? result : std::copysign(INFINITY, x);
}

std::vector<double> rounded_to(DType dtype, const std::vector<float>& x) {
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

double bits_value(std::uint32_t bits, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double sign = bits >> (mantissa_bits + exponent_bits) & 1u ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1u << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

std::uint64_t Random::bits() { return bits_(); }

double Random::uniform(double low, double high) {
  return low + (high - low) * std::ldexp(static_cast<double>(bits_() >> 11), -53);
}

std::vector<float> Random::floats(std::size_t n, double low, double high) {
  std::vector<float> result(n);
  for (float& x : result) x = static_cast<float>(uniform(low, high));
  return result;
}

StoredTensor f32_tensor(std::string name, std::vector<std::int64_t> shape,
                        std::span<const float> values) {
  const auto bytes = std::as_bytes(values);
  return {std::move(name), DType::f32, std::move(shape), {bytes.begin(), bytes.end()}};
}

StoredTensor random_matrix(std::string name, DType dtype, int rows, int cols, double size,
                           Random& random) {
  const int blocks = rows * cols / values_per_block(dtype);
  StoredTensor tensor{std::move(name), dtype, {rows, cols}, {}};
  tensor.bytes.resize(static_cast<std::size_t>(blocks) * bytes_per_block(dtype));
  std::byte* next = tensor.bytes.data();
  const auto append = [&](auto value) {
    std::memcpy(next, &value, sizeof value);
    next += sizeof value;
  };
  const int exponent = std::ilogb(size);
  const auto float_bits = [&](int mantissa_bits, int bias) {
    const int e = std::max(0, exponent + bias - random.below(3));  // at 0: subnormal
    return static_cast<std::uint64_t>(e) << mantissa_bits |
           (random.bits() & ((1ull << mantissa_bits) - 1));
  };
  const auto half = [&](int range) {  // of what is multiplied by up to 2^range
    const std::uint64_t sign = random.bits() & 1u;
    const auto stored = static_cast<std::uint16_t>(sign << 15 | float_bits(10, 15 - range));
    append(stored);
    return stored;
  };
  const auto bytes = [&](int n) {
    for (; n > 0; --n) *next++ = static_cast<std::byte>(random.bits());
  };
  // A min is 2^powers as large as the scale, so that values lie around 0.
  const auto scale_and_min = [&](int range, int powers, bool opposite) {
    const int scale = half(range) ^ (opposite ? 0x8000 : 0);
    append(static_cast<std::uint16_t>(scale + (powers << 10)));
  };
  for (int i = 0; i < blocks; ++i) {
    switch (dtype) {
      case DType::f32: append(static_cast<float>(random.uniform(-size, size))); break;
      case DType::f16: half(0); break;
      case DType::bf16: {
        const std::uint64_t sign = random.bits() & 1u;
        append(static_cast<std::uint16_t>(sign << 15 | float_bits(7, 127)));
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

std::vector<std::size_t> halves_of(DType dtype) {
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

namespace {

double iq4_level(int nibble) {
  constexpr int kLevels[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                             1,    13,   25,  38,  53,  69,  89,  113};
  return kLevels[nibble];
}

}  // namespace

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
std::vector<double> values_of(const StoredTensor& tensor) {
  std::vector<double> values;
  values.reserve(tensor.bytes.size() / bytes_per_block(tensor.dtype) *
                 static_cast<std::size_t>(values_per_block(tensor.dtype)));
  const std::byte* p = tensor.bytes.data();
  const std::byte* const end = p + tensor.bytes.size();
  const auto take = [&](auto value) {
    std::memcpy(&value, p, sizeof value);
    p += sizeof value;
    return value;
  };
  while (p < end) {
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

std::string mismatch(std::span<const float> actual, std::span<const double> expected,
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

std::vector<const cpu::Kernels*> all_kernels() {
  std::vector<const cpu::Kernels*> tables;
  for (int i = 0; cpu::supported_kernels(i) != nullptr; ++i) {
    tables.push_back(cpu::supported_kernels(i));
  }
  return tables;
}

namespace {

const std::string kAskedIsa = [] {
  const char* name = std::getenv("SBD_ISA");
  return name != nullptr ? name : "";
}();

}  // namespace

std::vector<const cpu::Kernels*> tested_kernels() {
  asked_for_every_isa = true;
  std::vector<const cpu::Kernels*> tables = all_kernels();
  if (!kAskedIsa.empty()) {
    std::erase_if(tables, [](const cpu::Kernels* table) { return table->name != kAskedIsa; });
  }
  return tables;
}

}  // namespace sbd::test
