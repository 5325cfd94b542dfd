// What RoPE turns by from position to position.
#pragma once

#include <vector>

#include "format/model_config.h"

namespace sbd {

// [head_dim / 2] radians: theta^(-2i/D), with linear scaling or YaRN's.
std::vector<float> rope_frequencies(const ModelConfig& config);

}  // namespace sbd
