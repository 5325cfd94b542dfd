// The decoders by name. A new method is one new file, and in registry.cpp its maker and one line.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "decode/d2f.h"
#include "decode/decoder.h"
#include "decode/dmtd.h"
#include "decode/set_block.h"

namespace sbd {

// What the methods need beyond the task; each takes and checks what it uses.
struct DecoderOptions {
  BlockMethod block;
  bool has_mask_token = false;
  std::optional<DmtdMethod> dmtd;  // where the model's layers are cut
  D2fMethod d2f;
  bool has_adapter = false;
  std::vector<std::string> named;  // the decoders that the model file names
};

// Errors: a name that is not there (lists the names), a model without what the method needs.
std::unique_ptr<Decoder> make_decoder(const std::string& name, DecodeTask task,
                                      const DecoderOptions& options);

std::vector<std::string> decoder_names();

}  // namespace sbd
