// Model metadata as Python values, and back.
#pragma once

#include <pybind11/pybind11.h>

#include "decode/registry.h"
#include "format/metadata.h"
#include "format/model_config.h"

namespace sbd {

pybind11::dict to_dict(const Metadata& metadata);
pybind11::dict to_dict(const ModelConfig& config);
pybind11::dict to_dict(const DecoderOptions& defaults);

// Values are bool, int, float, str or lists of one of them; anything else is an error that names
// the key.
Metadata to_metadata(const pybind11::dict& values);

}  // namespace sbd
