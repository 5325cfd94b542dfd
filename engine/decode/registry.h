// The decoders by name. A new method is one new file, and in registry.cpp its maker and one line.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "decode/decoder.h"
#include "decode/unmask.h"

namespace sbd {

// What the methods need beyond the task; each takes and checks what it uses.
struct DecoderOptions {
  int block_size = 16;
  Unmask unmask;
  std::optional<TokenId> mask_token_id;  // of the model, if it has one
};

// Errors: a name that is not there (lists the names), a model without what the method needs.
std::unique_ptr<Decoder> make_decoder(const std::string& name, DecodeTask task,
                                      const DecoderOptions& options);

std::vector<std::string> decoder_names();

}  // namespace sbd
