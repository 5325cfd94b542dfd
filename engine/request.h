// One text to generate, and what it comes to with a model's defaults.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "decode/registry.h"
#include "format/model_config.h"

namespace sbd {

struct Request {
  std::vector<TokenId> prompt = {};
  int max_tokens = 256;
  std::string decoder = "auto";
  OptionValues options = {};  // those that are set
  float temperature = 0.0f;
  float top_p = 1.0f;
  int top_k = 0;
  float min_p = 0.0f;
  std::vector<std::pair<TokenId, float>> logit_bias = {};
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  std::optional<int> logprobs = {};  // so many best tokens with each token's own
  std::shared_ptr<const Grammar> grammar = {};
  std::uint64_t seed = 0;
  std::uint64_t sample_index = 0;
  bool ignore_eos = false;
};

// Refuses token ids outside the vocabulary; the decoders check the rest.
DecodeTask decode_task(const Request& request, const ModelConfig& config, int n_ctx);

// The file's options with the request's in their place. Errors name the choices there are.
DecoderOptions decoder_options(const OptionValues& asked, DecoderOptions file);

// Those of the options that decide what the decoder does.
std::vector<const Option*> options_in_force(const std::string& decoder,
                                            const DecoderOptions& options);

// Refuses what the request asks for without effect: who compares with and without it would find no
// difference. `options` are what it comes to.
void check_effect(const Request& request, const std::string& decoder, const DecoderOptions& options,
                  int n_ctx);

}  // namespace sbd
