#include "decode/registry.h"

#include <utility>

#include "core/error.h"
#include "decode/names.h"
#include "decode/ntp.h"
#include "decode/set_block.h"

namespace sbd {
namespace {

std::unique_ptr<Decoder> make_ntp(DecodeTask task, const DecoderOptions&) {
  return std::make_unique<NtpDecoder>(std::move(task));
}

std::unique_ptr<Decoder> make_sbd(DecodeTask task, const DecoderOptions& options) {
  SBD_CHECK(options.mask_token_id.has_value(),
            "decoder \"sbd\" needs a mask token and the model file names none: convert the model "
            "with --mask-token TOKEN, or use decoder \"ntp\"");
  return std::make_unique<SetBlockDecoder>(std::move(task), options.block_size, options.unmask,
                                           *options.mask_token_id);
}

constexpr Named<std::unique_ptr<Decoder> (*)(DecodeTask, const DecoderOptions&)> kDecoders[] = {
    {"ntp", make_ntp},
    {"sbd", make_sbd},
};

}  // namespace

std::unique_ptr<Decoder> make_decoder(const std::string& name, DecodeTask task,
                                      const DecoderOptions& options) {
  check_task(task);
  return find_named(kDecoders, "decoder", name)(std::move(task), options);
}

std::vector<std::string> decoder_names() {
  std::vector<std::string> names;
  for (const auto& entry : kDecoders) {
    names.emplace_back(entry.name);
  }
  return names;
}

}  // namespace sbd
