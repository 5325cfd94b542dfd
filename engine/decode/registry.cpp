#include "decode/registry.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/names.h"
#include "decode/full_context.h"
#include "decode/lossless.h"
#include "decode/ntp.h"
#include "decode/set_block.h"

namespace sbd {
namespace {

using Made = std::unique_ptr<Decoder>;

Made make_ntp(const std::string&, DecodeTask task, const DecoderOptions&) {
  return std::make_unique<NtpDecoder>(std::move(task));
}

void check_mask_token(const std::string& name, const DecoderOptions& options) {
  SBD_CHECK(options.has_mask_token,
            "decoder \"{}\" needs a mask token and the model file names none: convert the model "
            "with --mask-token TOKEN, or use decoder \"ntp\"",
            name);
}

std::string named_others(const std::string& name, const DecoderOptions& options) {
  std::vector<std::string> others = options.named;
  std::erase(others, name);
  return others.empty() ? "ntp" : joined(others);
}

// Without a cache nothing is final before all is, and d2f begins blocks before those in front of
// them are decided.
void check_free(const std::string& name, const DecodeTask& task) {
  SBD_CHECK(!task.rules.grammar,
            "decoder \"{}\" cannot keep a text to a grammar, as it decides it in any order: leave "
            "out `{}`, or use `decoder` ntp",
            name, task.rules.grammar->name());
}

Made make_blockwise(const std::string& name, DecodeTask task, const BlockMethod& method) {
  if (method.commit_attention == CommitAttention::none) {
    check_free(name, task);
    return std::make_unique<FullContextDecoder>(std::move(task), method);
  }
  return std::make_unique<SetBlockDecoder>(std::move(task), method);
}

// Fused, whatever a family's own loop does.
Made make_sbd(const std::string& name, DecodeTask task, const DecoderOptions& options) {
  check_mask_token(name, options);
  BlockMethod method = options.block;
  SBD_CHECK(method.logit_shift == 0 || method.commit_attention == CommitAttention::none,
            "decoder \"{}\" fuses a block's commit with the next block, whose first token this "
            "model predicts from that commit: use {}",
            name, named_others(name, options));
  method.seed_slot = false;
  return make_blockwise(name, std::move(task), method);
}

// A family's own loop is what its file says. None of them bars what stands behind an EOS.
Made make_family(const std::string& name, DecodeTask task, const DecoderOptions& options) {
  SBD_CHECK(std::ranges::find(options.named, name) != options.named.end(),
            "decoder \"{}\" needs a model of that family, whose file says how it is decoded; this "
            "one names: {}",
            name, joined(options.named));
  check_mask_token(name, options);
  BlockMethod method = options.block;
  method.past_eos = true;
  return make_blockwise(name, std::move(task), method);
}

int needed_block_size(const std::string& name, const DecoderOptions& options) {
  SBD_CHECK(options.block.block_size.has_value(),
            "decoder \"{}\" needs a block size and the model file names none: give `block_size`",
            name);
  return *options.block.block_size;
}

void check_lossless(const std::string& name, const DecoderOptions& options) {
  SBD_CHECK(
      options.has_mask_token || options.has_mask_embedding,
      "decoder \"{}\" needs a mask token and the model file names none: give a `draft` adapter "
      "that has a mask embedding, convert the model with --mask-token TOKEN, or use decoder "
      "\"ntp\"",
      name);
  const BlockMethod& block = options.block;
  SBD_CHECK(block.prompt_attention == PromptAttention::causal &&
                block.commit_attention == CommitAttention::causal && block.logit_shift == 0,
            "decoder \"{}\" verifies by causal rows, and this model's cache is not causal", name);
}

std::shared_ptr<DraftHistory> history(const DecoderOptions& options) {
  return options.block_size_asked ? nullptr : options.drafts;
}

Made make_sbd_lossless(const std::string& name, DecodeTask task, const DecoderOptions& options) {
  check_lossless(name, options);
  return std::make_unique<LosslessDecoder>(
      std::move(task), LosslessMethod{.mask_token_id = options.block.mask_token_id,
                                      .block_size = needed_block_size(name, options),
                                      .unmask = options.block.unmask,
                                      .adapted = options.has_adapter,
                                      .history = history(options),
                                      .rule_kept = options.unmask_asked});
}

// Every mask is drafted in one forward.
Made make_speculation(const std::string& name, DecodeTask task, const DecoderOptions& options) {
  check_lossless(name, options);
  const int block_size = needed_block_size(name, options);
  return std::make_unique<LosslessDecoder>(
      std::move(task), LosslessMethod{.mask_token_id = options.block.mask_token_id,
                                      .block_size = block_size,
                                      .unmask = {.rule = UnmaskRule::top_n,
                                                 .top_n = std::max(block_size, kMaxDraft)},
                                      .fused = false,
                                      .adapted = options.has_adapter,
                                      .history = history(options),
                                      .rule_kept = true});
}

Made make_dmtd(const std::string& name, DecodeTask task, const DecoderOptions& options) {
  SBD_CHECK(options.has_layer_cut,
            "decoder \"{}\" needs a cut of the layers and the model file has none: convert the "
            "model with --set sbd.dmtd.layers=E,T,D, or use decoder \"ntp\"",
            name);
  return std::make_unique<DmtdDecoder>(std::move(task), options.dmtd);
}

Made make_d2f(const std::string& name, DecodeTask task, const DecoderOptions& options) {
  check_mask_token(name, options);
  check_free(name, task);
  D2fMethod method = options.d2f;
  method.mask_token_id = options.block.mask_token_id;
  method.block_size = needed_block_size(name, options);
  method.logit_shift = options.block.logit_shift;
  return std::make_unique<D2fDecoder>(std::move(task), method);
}

struct Method {
  Made (*make)(const std::string&, DecodeTask, const DecoderOptions&);
  unsigned options;  // that it reads, by their groups
  bool drafts = false;
};

namespace in = option_group;
constexpr unsigned kBlockwise = in::block | in::unmask | in::steps;

constexpr Named<Method> kDecoders[] = {
    {"ntp", {make_ntp, 0}},
    {"sbd", {make_sbd, kBlockwise}},
    {"sbd_lossless", {make_sbd_lossless, in::block | in::unmask, /*drafts=*/true}},
    {"dmtd", {make_dmtd, in::dmtd}},
    {"d2f", {make_d2f, in::block | in::d2f}},
    {"nemotron", {make_family, kBlockwise}},
    {"nemotron_spec", {make_speculation, in::block, /*drafts=*/true}},
    {"sdar", {make_family, kBlockwise}},
    {"fast_dllm_v2", {make_family, kBlockwise}},
    {"llada", {make_family, kBlockwise}},
    {"dream", {make_family, kBlockwise}},
};

}  // namespace

std::unique_ptr<Decoder> make_decoder(const std::string& name, DecodeTask task,
                                      const DecoderOptions& options) {
  check_task(task);
  check_options(options);
  return find_named(kDecoders, "decoder", name).make(name, std::move(task), options);
}

bool reads(const std::string& decoder, const Option& option) {
  return (find_named(kDecoders, "decoder", decoder).options & option.group) != 0;
}

bool drafts(const std::string& decoder) { return find_named(kDecoders, "decoder", decoder).drafts; }

std::vector<std::string> decoder_names() {
  const auto names = names_of(kDecoders);
  return {names.begin(), names.end()};
}

std::optional<std::string> refusal(const std::string& name, const DecoderOptions& options,
                                   int n_ctx) {
  DecodeTask task;
  task.prompt = {0};
  task.n_ctx = n_ctx;
  try {
    make_decoder(name, std::move(task), options);
    return std::nullopt;
  } catch (const Error& error) {
    return error.what();
  }
}

std::vector<std::string> able_decoders(const DecoderOptions& options, int n_ctx) {
  std::vector<std::string> able = decoder_names();
  std::erase_if(able, [&](const std::string& name) { return refusal(name, options, n_ctx); });
  return able;
}

}  // namespace sbd
