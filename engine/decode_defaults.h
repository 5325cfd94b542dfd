// How a model file wants to be decoded: its `sbd.*` keys.
#pragma once

#include "decode/registry.h"
#include "format/metadata.h"
#include "format/model_config.h"

namespace sbd {

// Checks every value's type and range, and their agreement; errors name the key.
DecoderOptions read_decode_defaults(const Metadata& metadata, const ModelConfig& config);

}  // namespace sbd
