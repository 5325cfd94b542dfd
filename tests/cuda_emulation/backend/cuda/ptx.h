// The software twin of engine/backend/cuda/ptx.h, found before it by the emulation's include path.
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"

namespace sbd::cuda {

inline std::uint8_t* shared_memory() { return emulation::shared_memory(); }
inline void copy_async(void* shared, const void* global, bool real) {
  emulation::copy_async(shared, global, 16, real);
}
inline void copy_eight_async(void* shared, const void* global, bool real) {
  emulation::copy_async(shared, global, 8, real);
}
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kWarp = 32;

namespace emulated {

template <typename T, typename Combine>
struct Combined {
  T value;
  Combine* combine;
};

template <typename T, typename Combine>
void combine(void* const* lanes) {
  T values[kWarp], before[kWarp];
  const auto of = [&](int i) { return static_cast<Combined<T, Combine>*>(lanes[i]); };
  for (int i = 0; i < kWarp; ++i) values[i] = of(i)->value;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    std::copy_n(values, kWarp, before);
    for (int i = 0; i < kWarp; ++i) values[i] = (*of(i)->combine)(before[i], before[i ^ step]);
  }
  for (int i = 0; i < kWarp; ++i) of(i)->value = values[i];
}

}  // namespace emulated

// All steps where the lanes meet: a meeting for each would be most of what the emulation does.
template <typename T, typename Combine>
T warp_reduce(T x, Combine combine) {
  emulated::Combined<T, Combine> mine{x, &combine};
  emulation::meet_warp("reduce", &mine, &emulated::combine<T, Combine>);
  return mine.value;
}

enum class CachePolicy { normal, evict_first };
inline CachePolicy cache_policy(bool evict_first) {
  return evict_first ? CachePolicy::evict_first : CachePolicy::normal;
}
inline void copy_async(void* shared, const void* global, CachePolicy) {
  emulation::copy_async(shared, global, 16, true);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int N>
void wait_copies() {
  emulation::wait_copies(N);
}
inline void prefetch_line(const void* global) { emulation::prefetch(global); }
inline void wait_for_previous_kernel() { emulation::wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

// The nearest half, ties to even: what is added to a float of the half's last place times 2^23
// is rounded there.
inline std::uint16_t to_half_bits(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520
  // The last place is a unit of 2^(exponent - 10), and no smaller than 2^-24.
  const std::uint32_t exponent = std::max(size >> 23, 113u);  // as a float's: 2^-14 and up
  const float anchor = std::bit_cast<float>((exponent + 13) << 23);
  const float rounded = std::bit_cast<float>(size) + anchor;
  const std::uint32_t units = std::bit_cast<std::uint32_t>(rounded) & 0x7fffffu;
  return static_cast<std::uint16_t>(sign | (((exponent - 113) << 10) + units));
}
inline std::uint16_t to_bf16_bits(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline std::uint32_t to_halves(float low, float high) {
  return to_half_bits(low) | static_cast<std::uint32_t>(to_half_bits(high)) << 16;
}
inline std::uint32_t to_bf16_pair(float low, float high) {
  return to_bf16_bits(low) | static_cast<std::uint32_t>(to_bf16_bits(high)) << 16;
}
inline float low_half(std::uint32_t pair) {
  return half_to_float(static_cast<std::uint16_t>(pair));
}
inline float high_half(std::uint32_t pair) { return low_half(pair >> 16); }

inline std::uint32_t fma_halves(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const auto one = [](float x, float y, float z) {  // exact in float64 for what kernels multiply
    return static_cast<float>(static_cast<double>(x) * y + z);
  };
  return to_halves(one(low_half(a), low_half(b), low_half(c)),
                   one(high_half(a), high_half(b), high_half(c)));
}
inline std::uint32_t and_or(std::uint32_t a, std::uint32_t mask, std::uint32_t bits) {
  return (a & mask) | bits;
}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

namespace emulated {

struct Rows {
  const void* row;
  std::uint32_t* out;
};

// Element (row, column) of matrix i lies in the row that lane 8 i + row points at.
template <bool kTransposed>
void load_matrices(void* const* lanes) {
  const auto element = [&](int matrix, int row, int column) {
    const auto* at =
        static_cast<const std::uint16_t*>(static_cast<const Rows*>(lanes[matrix * 8 + row])->row);
    return static_cast<std::uint32_t>(at[column]);
  };
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t* out = static_cast<const Rows*>(lanes[lane])->out;
    for (int i = 0; i < 4; ++i) {
      const int r = lane / 4, c = lane % 4 * 2;
      out[i] = kTransposed ? element(i, c, r) | element(i, c + 1, r) << 16
                           : element(i, r, c) | element(i, r, c + 1) << 16;
    }
  }
}

struct Operands {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

template <float (*kValue)(std::uint16_t)>
void multiply(void* const* lanes) {
  double a[16][16], b[16][8], sums[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) {
        const auto bits = static_cast<std::uint16_t>(mine.a[i] >> (16 * j));
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + j] = kValue(bits);
        if (i < 2)
          b[2 * t + i * 8 + j][g] = kValue(static_cast<std::uint16_t>(mine.b[i] >> (16 * j)));
      }
      sums[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
    }
  }
  emulation::add_products(a, b, sums);
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const Operands*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      d[i] = static_cast<float>(sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
}

inline float half_value(std::uint16_t bits) { return half_to_float(bits); }
inline float bf16_value(std::uint16_t bits) { return bf16_to_float(bits); }

}  // namespace emulated

template <bool kTransposed>
void load_matrices(const void* row, std::uint32_t (&out)[4]) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulation::stop("a matrix row off 16 bytes");
  emulated::Rows mine{row, out};
  emulation::meet_warp(kTransposed ? "load transposed" : "load", &mine,
                       &emulated::load_matrices<kTransposed>);
}

inline void multiply_halves(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                            std::uint32_t b1) {
  emulated::Operands mine{d, a, {b0, b1}};
  emulation::meet_warp("multiply halves", &mine, &emulated::multiply<emulated::half_value>);
}
inline void multiply_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1) {
  emulated::Operands mine{d, a, {b0, b1}};
  emulation::meet_warp("multiply bf16", &mine, &emulated::multiply<emulated::bf16_value>);
}

}  // namespace sbd::cuda
