#pragma once

#include <span>
#include <vector>

#include "backend/cpu/sampler.h"

namespace sbd::cpu {

// A sample with scratch of its own.
inline Sample draw_one(const Kernels& kernels, std::span<const float> logits,
                       const Sampling& sampling, int position) {
  std::vector<TokenId> scratch(logits.size());
  return sample(kernels, logits, sampling, position, scratch);
}

}  // namespace sbd::cpu
