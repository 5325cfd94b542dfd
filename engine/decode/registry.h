// The decoders by name. A new method is one new file, and in registry.cpp its maker and one line.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "decode/decoder.h"
#include "decode/options.h"

namespace sbd {

// Errors: a name that is not there (lists the names), a model without what the method needs.
std::unique_ptr<Decoder> make_decoder(const std::string& name, DecodeTask task,
                                      const DecoderOptions& options);

// That it drafts tokens which next-token decoding verifies, and so may do it with an adapter.
bool drafts(const std::string& decoder);

std::vector<std::string> decoder_names();

// That the decoder reads the option; one for unmasking, if its rule does.
bool reads(const std::string& decoder, const Option& option);

// Why the decoder cannot run with these options, whatever the prompt; nothing where it can.
std::optional<std::string> refusal(const std::string& name, const DecoderOptions& options,
                                   int n_ctx);
std::vector<std::string> able_decoders(const DecoderOptions& options, int n_ctx);

}  // namespace sbd
