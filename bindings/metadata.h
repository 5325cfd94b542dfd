// Model metadata as Python values, and back.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "decode/registry.h"
#include "format/metadata.h"
#include "format/model_config.h"

namespace sbd {

pybind11::dict to_dict(const Metadata& metadata);
pybind11::dict to_dict(const ModelConfig& config);
pybind11::dict to_dict(const DecoderOptions& defaults);
// By name: the options that decide what the decoder does.
pybind11::dict in_force(const std::string& decoder, DecoderOptions options);

// Values are bool, int, float, str or lists of one of them; anything else is an error that names
// the key.
Metadata to_metadata(const pybind11::dict& values);

}  // namespace sbd
