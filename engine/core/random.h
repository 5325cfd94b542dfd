// Counter-based random numbers: a value is a pure function of its key, so the same seed draws the
// same tokens on any thread count, batch or device.
#pragma once

#include <cstdint>

namespace sbd {

constexpr std::uint64_t mix64(std::uint64_t x) {  // the finaliser of SplitMix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

constexpr std::uint64_t combine(std::uint64_t key, std::uint64_t value) {
  return mix64(key + 0x9e3779b97f4a7c15ull + mix64(value + 0x9e3779b97f4a7c15ull));
}

// Uniform in the open interval (0, 1): the centres of 2^23 equal parts, which a float holds
// exactly, so that log(u) and log(-log(u)) are finite.
constexpr float uniform(std::uint64_t key, std::uint64_t counter) {
  return (static_cast<float>(combine(key, counter) >> 41) + 0.5f) * 0x1p-23f;
}

}  // namespace sbd
