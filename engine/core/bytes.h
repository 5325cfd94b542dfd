// Reading values out of bytes, and sizes in whole units.
#pragma once

#include <cstring>
#include <type_traits>

namespace sbd {

template <typename T>
T load_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

template <typename T>
constexpr T round_up(T n, std::type_identity_t<T> multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace sbd
