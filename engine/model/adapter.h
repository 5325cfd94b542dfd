// A LoRA adapter that stays beside the model: rows that ask for it add scale B A x to its matmuls,
// and may have a mask of its own. A model that drafts with one verifies without.
#pragma once

#include <vector>

#include "model/weights.h"

namespace sbd {

struct Adapter {
  struct Pair {
    WeightPtr a;  // [rank, in], or null
    WeightPtr b;  // [out, rank]
    float scale = 0;
    LowRank view() const { return {a.get(), b.get(), scale}; }
  };
  struct Layer {
    Pair q, k, v, o, gate, up, down;
  };
  std::vector<Layer> layers;  // none: there is no adapter
  Buffer mask_embedding;      // [H], or null: the vocabulary's mask token

  bool empty() const { return layers.empty(); }
};

// A file in GGUF's layout of adapters. One of another model's shapes or architecture, or with a
// tensor that is none of these, is an error. `quantised`: the model's products are int8's, and so
// are those of F16 factors whose rows are whole groups: they are rounded to Q8_0, which takes half
// the memory and a third of the time, and which no text can notice.
Adapter load_adapter(const GgufFile& file, const ModelConfig& config, Backend& backend,
                     bool quantised = false);

}  // namespace sbd
