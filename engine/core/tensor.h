// A weight as a model file holds it and as a backend takes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace sbd {

struct Tensor {
  std::string name;
  DType dtype;
  // Row-major, [out_features, in_features] for a weight: GGUF's order reversed.
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

}  // namespace sbd
