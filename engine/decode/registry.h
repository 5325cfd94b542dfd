// The decoders by name. A new method is one new file, and in registry.cpp its maker and one line.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "decode/block_method.h"
#include "decode/d2f.h"
#include "decode/decoder.h"
#include "decode/dmtd.h"

namespace sbd {

// What the methods need beyond the task: a model file's, or these with a request's in their place.
// Each decoder takes and checks what it uses.
struct DecoderOptions {
  std::vector<std::string> named = {"ntp"};  // by the model file: `auto` takes the first
  bool has_mask_token = false;
  bool has_layer_cut = false;
  bool has_adapter = false;
  BlockMethod block;
  DmtdMethod dmtd;
  D2fMethod d2f;  // its thresholds: the rest is the block's
};

// Errors: a name that is not there (lists the names), a model without what the method needs.
std::unique_ptr<Decoder> make_decoder(const std::string& name, DecodeTask task,
                                      const DecoderOptions& options);

std::vector<std::string> decoder_names();

// The options of a request that the decoder reads, by name. Of those for unmasking, only its rule's
// count.
std::span<const std::string_view> options_of(const std::string& decoder);

// Why the decoder cannot run with these options, whatever the prompt; nothing where it can.
std::optional<std::string> refusal(const std::string& name, const DecoderOptions& options,
                                   int n_ctx);
std::vector<std::string> able_decoders(const DecoderOptions& options, int n_ctx);

}  // namespace sbd
