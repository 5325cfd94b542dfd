// How a model file wants to be decoded: its `sbd.*` keys.
#pragma once

#include "decode/registry.h"
#include "format/metadata.h"
#include "format/model_config.h"

namespace sbd {

// Checks every value's type and range, and their agreement; errors name the key.
DecoderOptions read_decode_defaults(const Metadata& metadata, const ModelConfig& config);

// What they become beside an adapter of these keys, which may bring a mask: the decoders that draft
// come first, sbd_lossless where none of the model's own does; its block size; what the choice of
// drafts begins with. One with which no decoder of the model can draft is an error.
DecoderOptions with_adapter(const Metadata& adapter, bool has_mask, const ModelConfig& config,
                            DecoderOptions defaults);

}  // namespace sbd
