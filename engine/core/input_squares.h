// What a weight's matmuls read: how much an error in each of its columns counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sbd {

struct InputSquares {
  std::string weight;        // its name in the model file
  std::vector<double> sums;  // [cols], of squares over the rows
  std::int64_t n_rows = 0;
};

}  // namespace sbd
