#include "backend/cuda/knobs.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace sbd::cuda {

namespace {

int setting(const char* name, int low, int high, int otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  const std::string_view all(text);
  int value = 0;
  const auto [rest, error] = std::from_chars(all.data(), all.data() + all.size(), value);
  SBD_CHECK(
      error == std::errc() && rest == all.data() + all.size() && value >= low && value <= high,
      "{}={}: expected an integer from {} to {}", name, text, low, high);
  return value;
}

}  // namespace

Knobs read_knobs() {
  const Knobs usual;
  return {.graphs = setting("SBD_CUDA_GRAPHS", 0, 1, usual.graphs) != 0,
          .overlap = setting("SBD_CUDA_OVERLAP", 0, 1, usual.overlap) != 0,
          .blocks = setting("SBD_CUDA_BLOCKS", 1, 16, usual.blocks),
          .prefetch = setting("SBD_CUDA_PREFETCH", 0, 64, usual.prefetch),
          .evict_first = setting("SBD_CUDA_EVICT_FIRST", 0, 1, usual.evict_first) != 0};
}

}  // namespace sbd::cuda
