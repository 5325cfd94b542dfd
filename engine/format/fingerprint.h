// Which model a file holds, as far as it is the same in every type of weights.
#pragma once

#include <string>

#include "format/gguf.h"

namespace sbd {

// What convert/fingerprint.py says of the file.
std::string fingerprint(const GgufFile& model);

}  // namespace sbd
