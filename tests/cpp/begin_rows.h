#pragma once

#include <vector>

#include "backend/backend.h"

namespace sbd::test {

// n rows that are nothing in particular.
inline void begin_rows(Backend& backend, int n) {
  const std::vector<int> numbers(static_cast<std::size_t>(n));
  backend.begin({numbers, numbers, numbers, {}}, {}, false);
}

}  // namespace sbd::test
