#pragma once

#include <cstdint>

namespace sbd {

using TokenId = std::int32_t;

// A masked slot of a draft that no token of the vocabulary stands for: nothing a text can hold.
inline constexpr TokenId kMaskSlot = -1;

struct Interval {  // [begin, end)
  int begin;
  int end;
};

}  // namespace sbd
