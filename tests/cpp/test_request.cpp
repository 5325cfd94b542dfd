// What a request comes to with a model file's defaults, and which decoders a file can run.
#include "request.h"

#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

ModelConfig config_with_mask() {
  ModelConfig config;
  config.vocab_size = 100;
  config.num_hidden_layers = 4;
  config.layer_runs = {0, 0, 4};
  config.eos_token_ids = {kEos};
  config.mask_token_id = kMask;
  return config;
}

DecoderOptions options_of(const Request& request, const DecodeDefaults& defaults = {},
                          const ModelConfig& config = config_with_mask()) {
  return decoder_options(request, config, defaults, /*has_adapter=*/false);
}

UnmaskRule rule_of(const Request& request, const DecodeDefaults& defaults = {}) {
  return options_of(request, defaults).block.unmask.rule;
}

TEST(request_parameter_of_one_rule_asks_for_that_rule) {
  DecodeDefaults defaults;
  defaults.unmask = "top_n";
  CHECK_EQ(rule_of({}, defaults), UnmaskRule::top_n);
  CHECK_EQ(rule_of({.gamma = 0.1f}, defaults), UnmaskRule::entropy_bounded);
  CHECK_EQ(rule_of({.factor = 1.0f}, defaults), UnmaskRule::factor);
  CHECK_EQ(rule_of({.confidence_threshold = 0.5f}, defaults), UnmaskRule::confidence);
  // Two rules have a number of positions, and all have an order.
  defaults.unmask = "confidence";
  CHECK_EQ(rule_of({.top_n = 3}, defaults), UnmaskRule::confidence);
  CHECK_EQ(rule_of({.proxy = "margin"}, defaults), UnmaskRule::confidence);
  defaults.unmask = "entropy_bounded";
  CHECK_EQ(rule_of({.top_n = 3}, defaults), UnmaskRule::top_n);
  CHECK_EQ(rule_of({.steps = 2}, defaults), UnmaskRule::top_n);
  CHECK_EQ(rule_of({.proxy = "margin"}, defaults), UnmaskRule::entropy_bounded);
  CHECK_THROWS_WITH(rule_of({.gamma = 0.0f, .factor = 4.0f}, defaults),
                    "expected one of gamma, factor and confidence_threshold");
  // A file's order is its own rule's.
  defaults.proxy = "margin";
  CHECK_EQ(options_of({.top_n = 3}, defaults).block.unmask.proxy.has_value(), false);
  CHECK(options_of({.gamma = 1.0f}, defaults).block.unmask.proxy == Proxy::margin);
  // A rule by name is that rule.
  CHECK_EQ(rule_of({.unmask = "factor", .gamma = 0.1f}, defaults), UnmaskRule::factor);
}

TEST(request_options_stand_over_the_files) {
  DecodeDefaults defaults;
  defaults.block_size = 4;
  defaults.sub_block_size = 2;
  defaults.steps = 3;
  defaults.schedule = "linear";
  defaults.proxy = "margin";
  defaults.gamma = 0.5f;
  defaults.factor = 2.0f;
  defaults.confidence_threshold = 0.25f;
  defaults.top_n = 5;
  defaults.logit_shift = 1;
  defaults.seed_slot = true;
  defaults.block_origin = "absolute";
  defaults.prompt_attention = "block_causal";
  defaults.commit_attention = "block";
  defaults.block_add_threshold = 0.125f;
  defaults.decoded_token_threshold = 0.375f;
  defaults.skip_threshold = 0.625f;

  const DecoderOptions file = options_of({}, defaults);
  CHECK(file.has_mask_token);
  CHECK_EQ(file.block.mask_token_id, kMask);
  CHECK_EQ(file.block.block_size, 4);
  CHECK_EQ(file.block.sub_block_size, 2);
  CHECK_EQ(file.block.steps, 3);
  CHECK_EQ(file.block.schedule, Schedule::linear);
  CHECK(file.block.unmask.proxy == Proxy::margin);
  CHECK_EQ(file.block.unmask.gamma, 0.5f);
  CHECK_EQ(file.block.unmask.factor, 2.0f);
  CHECK_EQ(file.block.unmask.confidence_threshold, 0.25f);
  CHECK_EQ(file.block.unmask.top_n, 5);
  CHECK_EQ(file.block.logit_shift, 1);
  CHECK(file.block.seed_slot);
  CHECK(file.block.absolute_blocks);
  CHECK_EQ(file.block.prompt_attention, PromptAttention::block_causal);
  CHECK_EQ(file.block.commit_attention, CommitAttention::block);
  CHECK_EQ(file.d2f.mask_token_id, kMask);
  CHECK_EQ(file.d2f.block_size, 4);
  CHECK_EQ(file.d2f.logit_shift, 1);
  CHECK_EQ(file.d2f.block_add_threshold, 0.125f);
  CHECK_EQ(file.d2f.decoded_token_threshold, 0.375f);
  CHECK_EQ(file.d2f.skip_threshold, 0.625f);

  const DecoderOptions asked = options_of({.block_size = 8,
                                           .steps = 6,
                                           .unmask = "top_n",
                                           .proxy = "position",
                                           .gamma = 0.75f,
                                           .factor = 3.0f,
                                           .confidence_threshold = 1.0f,
                                           .top_n = 7,
                                           .block_add_threshold = 0.0f,
                                           .decoded_token_threshold = 0.5f,
                                           .skip_threshold = 1.0f},
                                          defaults);
  CHECK_EQ(asked.block.block_size, 8);
  CHECK_EQ(asked.block.steps, 6);
  CHECK(asked.block.unmask.proxy == Proxy::position);
  CHECK_EQ(asked.block.unmask.gamma, 0.75f);
  CHECK_EQ(asked.block.unmask.factor, 3.0f);
  CHECK_EQ(asked.block.unmask.confidence_threshold, 1.0f);
  CHECK_EQ(asked.block.unmask.top_n, 7);
  CHECK_EQ(asked.d2f.block_size, 8);
  CHECK_EQ(asked.d2f.block_add_threshold, 0.0f);
  CHECK_EQ(asked.d2f.decoded_token_threshold, 0.5f);
  CHECK_EQ(asked.d2f.skip_threshold, 1.0f);
  CHECK(!options_of({}).block.unmask.proxy);  // the rule's own
}

TEST(request_names_that_are_not_there) {
  CHECK_THROWS_WITH(options_of({.unmask = "eb"}),
                    "unknown unmask \"eb\": expected one of entropy_bounded, factor, ");
  CHECK_THROWS_WITH(options_of({.proxy = "x"}), "unknown proxy \"x\": expected one of entropy, ");
  CHECK_THROWS_WITH(options_of({.proxy = ""}), "unknown proxy \"\"");
}

TEST(request_task) {
  const ModelConfig config = config_with_mask();
  const Request request{.prompt = {1, 2},
                        .max_tokens = 5,
                        .temperature = 0.5f,
                        .top_p = 0.75f,
                        .top_k = 3,
                        .seed = 4,
                        .sample_index = 2};
  const DecodeTask task = decode_task(request, config, 64);
  CHECK_EQ(task.prompt, (Tokens{1, 2}));
  CHECK_EQ(task.max_tokens, 5);
  CHECK_EQ(task.n_ctx, 64);
  CHECK_EQ(task.eos_token_ids, Tokens{kEos});
  CHECK_EQ(task.sampling.temperature, 0.5f);
  CHECK_EQ(task.sampling.top_p, 0.75f);
  CHECK_EQ(task.sampling.top_k, 3);
  CHECK_EQ(task.sampling.seed, 4);
  CHECK_EQ(task.sampling.sample_index, 2);
  CHECK(decode_task({.prompt = {1}, .ignore_eos = true}, config, 64).eos_token_ids.empty());
  for (const TokenId outside : {-1, 100}) {
    CHECK_THROWS_WITH(decode_task({.prompt = {1, outside}}, config, 64),
                      "is outside the vocabulary of 100");
  }
}

TEST(request_horizon_needs_a_cut_of_the_layers) {
  ModelConfig config = config_with_mask();
  CHECK(!options_of({.horizon = 2}, {}, config).dmtd);
  DecodeDefaults defaults;
  defaults.horizon = 3;
  defaults.prompt_rule = "train";
  for (const auto& runs : {std::array{1, 1, 2}, std::array{0, 3, 1}}) {
    config.layer_runs = runs;
    const DecoderOptions file = options_of({}, defaults, config);
    CHECK(file.dmtd && file.dmtd->horizon == 3 && file.dmtd->prompt_rule == DmtdPromptRule::train);
    CHECK_EQ(options_of({.horizon = 2}, defaults, config).dmtd->horizon, 2);
  }
}

// --- Which decoders a file can run ---

TEST(request_families_need_a_file_of_theirs) {
  DecodeDefaults defaults;
  defaults.decoders = {"sbd", "ntp"};
  for (const char* family : {"nemotron", "sdar", "fast_dllm_v2", "llada", "dream"}) {
    CHECK_THROWS_WITH(make_decoder(family, task({1}, 9), options_of({}, defaults)),
                      "needs a model of that family, whose file says how it is decoded; this one "
                      "names: sbd, ntp");
    DecodeDefaults own = defaults;
    own.decoders.push_back(family);
    CHECK(make_decoder(family, task({1}, 9), options_of({}, own)) != nullptr);
    ModelConfig config = config_with_mask();
    config.mask_token_id = std::nullopt;
    CHECK_THROWS_WITH(make_decoder(family, task({1}, 9), options_of({}, own, config)),
                      "needs a mask token and the model file names none");
  }
}

// A family's loop looks past an EOS, SBD does not; SBD seeds nothing.
TEST(request_families_loops_are_not_sbds) {
  DecodeDefaults defaults;
  defaults.decoders = {"nemotron", "sbd"};
  defaults.seed_slot = true;
  defaults.block_size = 4;
  defaults.unmask = "top_n";
  const DecoderOptions options = options_of({}, defaults);
  const auto family = make_decoder("nemotron", task({1}, 9), options);
  CHECK_EQ(text(family->plan()), "[1 causal commit > 0]");
  CHECK_EQ(absorb(*family, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(absorb(*family, {row(11, 2), row(kEos, 1), row(13, 3)}), "2:7 | |");
  CHECK_EQ(text(family->plan()), "[10 _ 7 _ block scratch > 1 3]");

  const auto sbd = make_decoder("sbd", task({1}, 9), options);
  CHECK_EQ(text(sbd->plan()), "[1 causal commit] [_ _ _ _ block scratch > 0 1 2 3]");
  CHECK_EQ(absorb(*sbd, {row(10, 3), row(11, 2), row(kEos, 1), row(13, 4)}), "2:7 | |");
  CHECK_EQ(text(sbd->plan()), "[_ _ 7 _ block scratch > 0 1]");
}

TEST(request_sbd_of_shifted_logits) {
  DecodeDefaults defaults;
  defaults.decoders = {"fast_dllm_v2", "ntp"};
  defaults.logit_shift = 1;
  defaults.seed_slot = true;
  CHECK_THROWS_WITH(make_decoder("sbd", task({1}, 9), options_of({}, defaults)),
                    "fuses a block's commit with the next block, whose first token this model "
                    "predicts from that commit: use fast_dllm_v2, ntp");
  defaults.seed_slot = false;
  defaults.prompt_attention = "full";
  defaults.commit_attention = "none";
  CHECK(make_decoder("sbd", task({1}, 9), options_of({}, defaults)) != nullptr);
}

}  // namespace
}  // namespace sbd
