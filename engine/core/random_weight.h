// Random weights, for timing: the same ones in every backend.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/random.h"

namespace sbd {

// Block `index` of a weight, in row-major order, as a file holds it: random bytes, of which those
// that decide how large its values are get set, so that these are below 0.03 and 0 in the mean.
constexpr void random_block(DType dtype, std::uint64_t key, std::uint64_t index,
                            std::uint8_t* block) {
  const std::size_t n_bytes = bytes_per_block(dtype);
  const std::uint64_t first_word = index * ((n_bytes + 7) / 8);
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < n_bytes; ++i) {
    if (i % 8 == 0) word = mix64(key + (first_word + i / 8) * 0x9e3779b97f4a7c15ull);
    block[i] = static_cast<std::uint8_t>(word >> (i % 8 * 8));
  }
  const auto set = [block](std::size_t at, std::uint32_t value) {  // 16 bits
    block[at] = static_cast<std::uint8_t>(value);
    block[at + 1] = static_cast<std::uint8_t>(value >> 8);
  };
  const auto bits = static_cast<std::uint32_t>(word);
  switch (dtype) {
    case DType::f32: {
      const auto value = std::bit_cast<std::uint32_t>((uniform(key, index) - 0.5f) * 0.04f);
      set(0, value);
      set(2, value >> 16);
      break;
    }
    case DType::f16: set(0, (bits & 0x83ffu) | 0x2000u); break;        // +-2^-7 to 2^-6
    case DType::bf16: set(0, (bits & 0x807fu) | 0x3c00u); break;       // the same
    case DType::q8_0: set(offsetof(BlockQ8_0, scale), 0x0a00); break;  // 1.8e-4
    case DType::q4_0: set(offsetof(BlockQ4_0, scale), 0x1a00); break;  // 2.9e-3
    case DType::q4_1:                                                  // min = -7.5 scale
      set(offsetof(BlockQ4_1, scale), 0x1a00);                         // 2.9e-3
      set(offsetof(BlockQ4_1, min), 0xa5a0);                           // -2.2e-2
      break;
    case DType::q5_0: set(offsetof(BlockQ5_0, scale), 0x1600); break;  // 1.5e-3
    case DType::q5_1:                                                  // min = -15.5 scale
      set(offsetof(BlockQ5_1, scale), 0x1600);                         // 1.5e-3
      set(offsetof(BlockQ5_1, min), 0xa5d0);                           // -2.3e-2
      break;
    case DType::iq4_nl: set(0, (bits & 0x8000u) | 0x0a00u); break;  // +-1.8e-4: levels lean down
    case DType::q2_k:                                               // min = 1.5 scale
      set(offsetof(BlockQ2_K, scale), 0x1000);                      // 4.9e-4
      set(offsetof(BlockQ2_K, min), 0x1200);                        // 7.3e-4
      break;
    case DType::q3_k: set(offsetof(BlockQ3_K, scale), 0x0a00); break;  // 1.8e-4
    case DType::q4_k:                                                  // min = 7.5 scale
      set(offsetof(BlockQ4_K, scale), 0x068e);                         // 1e-4
      set(offsetof(BlockQ4_K, min), 0x1225);                           // 7.5e-4
      break;
    case DType::q5_k:                           // min = 15.5 scale
      set(offsetof(BlockQ5_K, scale), 0x0347);  // 5e-5
      set(offsetof(BlockQ5_K, min), 0x1259);    // 7.7e-4
      break;
    case DType::q6_k: set(offsetof(BlockQ6_K, scale), 0x0150); break;      // 2e-5
    case DType::iq4_xs: set(offsetof(BlockIQ4_XS, scale), 0x0054); break;  // 5e-6
  }
}

}  // namespace sbd
