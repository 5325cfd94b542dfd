// A LoRA adapter that stays beside the model: rows that ask for it add scale B A x to an attention
// layer's output projection. A model that drafts with one verifies without.
#pragma once

#include <vector>

#include "model/weights.h"

namespace sbd {

struct Adapter {
  struct Layer {
    WeightPtr a;  // [rank, N D]
    WeightPtr b;  // [H, rank]
  };
  int rank = 0;  // 0: there is none
  float scale = 0;
  std::vector<Layer> layers;  // both null where a layer has none
};

// A file in GGUF's layout of adapters. One that changes anything but output projections, or has
// other shapes than the model, is an error.
Adapter load_adapter(const GgufFile& file, const ModelConfig& config, Backend& backend);

}  // namespace sbd
