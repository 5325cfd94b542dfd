// What a request comes to with a model file's defaults, and which decoders a file can run.
#include "request.h"

#include <algorithm>
#include <set>
#include <string>

#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

DecoderOptions with_mask() {
  DecoderOptions file;
  file.has_mask_token = true;
  file.block.mask_token_id = kMask;
  return file;
}

UnmaskRule rule_of(const OptionValues& asked, const DecoderOptions& file) {
  return decoder_options(asked, file).block.unmask.rule;
}

void effect(const OptionValues& asked, const std::string& decoder, const DecoderOptions& file) {
  check_effect({.options = asked}, decoder, decoder_options(asked, file), 100);
}

TEST(request_parameter_of_one_rule_asks_for_that_rule) {
  DecoderOptions file = with_mask();
  file.block.unmask.rule = UnmaskRule::top_n;
  CHECK_EQ(rule_of({}, file), UnmaskRule::top_n);
  CHECK_EQ(rule_of({{"gamma", 0.1f}}, file), UnmaskRule::entropy_bounded);
  CHECK_EQ(rule_of({{"factor", 1.0f}}, file), UnmaskRule::factor);
  CHECK_EQ(rule_of({{"confidence_threshold", 0.5f}}, file), UnmaskRule::confidence);
  // Two rules have a number of positions, and all have an order.
  file.block.unmask.rule = UnmaskRule::confidence;
  CHECK_EQ(rule_of({{"top_n", 3}}, file), UnmaskRule::confidence);
  CHECK_EQ(rule_of({{"proxy", "margin"}}, file), UnmaskRule::confidence);
  file.block.unmask.rule = UnmaskRule::entropy_bounded;
  CHECK_EQ(rule_of({{"top_n", 3}}, file), UnmaskRule::top_n);
  CHECK_EQ(rule_of({{"steps", 2}}, file), UnmaskRule::top_n);
  CHECK_EQ(rule_of({{"proxy", "margin"}}, file), UnmaskRule::entropy_bounded);
  CHECK_THROWS_WITH(rule_of({{"gamma", 0.0f}, {"factor", 4.0f}}, file),
                    "expected one of `gamma`, `factor`, `confidence_threshold`, as each asks");
  // A file's order is its own rule's.
  file.block.unmask.proxy = Proxy::margin;
  CHECK_EQ(decoder_options({{"top_n", 3}}, file).block.unmask.proxy.has_value(), false);
  CHECK(decoder_options({{"gamma", 1.0f}}, file).block.unmask.proxy == Proxy::margin);
  // A number of positions asked for stands in for the file's number of forwards.
  file.block.steps = 4;
  CHECK(!decoder_options({{"top_n", 3}}, file).block.steps);
  CHECK_EQ(decoder_options({{"steps", 2}}, file).block.steps.value(), 2);
  // A rule by name is that rule.
  CHECK_EQ(rule_of({{"unmask", "factor"}, {"gamma", 0.1f}}, file), UnmaskRule::factor);
}

TEST(request_options_stand_over_the_files) {
  DecoderOptions file = with_mask();
  file.block.block_size = 4;
  file.block.steps = 3;
  file.block.unmask = {.gamma = 0.5f,
                       .proxy = Proxy::margin,
                       .factor = 2.0f,
                       .confidence_threshold = 0.25f,
                       .top_n = 5};
  file.dmtd.horizon = 3;
  file.d2f.block_add_threshold = 0.125f;
  file.d2f.decoded_token_threshold = 0.375f;
  file.d2f.skip_threshold = 0.625f;

  const DecoderOptions own = decoder_options({}, file);
  CHECK(own.has_mask_token);
  CHECK_EQ(own.block.mask_token_id, kMask);
  CHECK_EQ(own.block.block_size.value(), 4);
  CHECK_EQ(own.block.steps.value(), 3);
  CHECK(own.block.unmask.proxy == Proxy::margin);
  CHECK_EQ(own.block.unmask.gamma, 0.5f);
  CHECK_EQ(own.block.unmask.factor, 2.0f);
  CHECK_EQ(own.block.unmask.confidence_threshold, 0.25f);
  CHECK_EQ(own.block.unmask.top_n, 5);
  CHECK_EQ(own.dmtd.horizon, 3);
  CHECK_EQ(own.d2f.block_add_threshold, 0.125f);
  CHECK_EQ(own.d2f.decoded_token_threshold, 0.375f);
  CHECK_EQ(own.d2f.skip_threshold, 0.625f);

  const DecoderOptions asked = decoder_options({{"block_size", 8},
                                                {"steps", 6},
                                                {"unmask", "top_n"},
                                                {"proxy", "position"},
                                                {"gamma", 0.75f},
                                                {"factor", 3.0f},
                                                {"confidence_threshold", 1.0f},
                                                {"top_n", 7},
                                                {"horizon", 2},
                                                {"block_add_threshold", 0.0f},
                                                {"decoded_token_threshold", 0.5f},
                                                {"skip_threshold", 1.0f}},
                                               file);
  CHECK_EQ(asked.block.block_size.value(), 8);
  CHECK_EQ(asked.block.steps.value(), 6);
  CHECK(asked.block.unmask.proxy == Proxy::position);
  CHECK_EQ(asked.block.unmask.gamma, 0.75f);
  CHECK_EQ(asked.block.unmask.factor, 3.0f);
  CHECK_EQ(asked.block.unmask.confidence_threshold, 1.0f);
  CHECK_EQ(asked.block.unmask.top_n, 7);
  CHECK_EQ(asked.dmtd.horizon, 2);
  CHECK_EQ(asked.d2f.block_add_threshold, 0.0f);
  CHECK_EQ(asked.d2f.decoded_token_threshold, 0.5f);
  CHECK_EQ(asked.d2f.skip_threshold, 1.0f);
  CHECK(!decoder_options({}, with_mask()).block.unmask.proxy);  // the rule's own
}

TEST(request_names_that_are_not_there) {
  CHECK_THROWS_WITH(decoder_options({{"unmask", "eb"}}, with_mask()),
                    "unknown `unmask` \"eb\": expected one of entropy_bounded, factor, ");
  CHECK_THROWS_WITH(decoder_options({{"proxy", "x"}}, with_mask()),
                    "unknown `proxy` \"x\": expected one of entropy, ");
  CHECK_THROWS_WITH(decoder_options({{"proxy", ""}}, with_mask()), "unknown `proxy` \"\"");
}

// --- Options without effect ---

// What each decoder reads when the rule is the one that reads the option.
TEST(request_options_that_no_decoder_in_use_reads) {
  struct Case {
    const char* name;
    OptionValues asked;
    std::set<std::string> decoders;
  };
  const std::set<std::string> fused = {"sbd", "nemotron", "sdar", "fast_dllm_v2", "llada", "dream"};
  std::set<std::string> rules = fused;
  rules.insert("sbd_lossless");
  std::set<std::string> blocks = rules;
  blocks.insert({"d2f", "nemotron_spec"});
  const Case cases[] = {
      {"block_size", {{"block_size", 8}}, blocks},
      {"unmask", {{"unmask", "factor"}}, rules},
      {"gamma", {{"gamma", 0.5f}}, rules},
      {"proxy", {{"proxy", "margin"}}, rules},
      {"factor", {{"factor", 2.0f}}, rules},
      {"confidence_threshold", {{"confidence_threshold", 0.5f}}, rules},
      {"top_n", {{"top_n", 2}}, rules},
      {"steps", {{"steps", 2}}, fused},
      {"horizon", {{"horizon", 2}}, {"dmtd"}},
      {"block_add_threshold", {{"block_add_threshold", 0.5f}}, {"d2f"}},
      {"decoded_token_threshold", {{"decoded_token_threshold", 0.5f}}, {"d2f"}},
      {"skip_threshold", {{"skip_threshold", 0.5f}}, {"d2f"}},
  };
  const DecoderOptions file = with_mask();
  for (const auto& [name, asked, decoders] : cases) {
    for (const std::string& decoder : decoder_names()) {
      const DecoderOptions options = decoder_options(asked, file);
      const auto names = options_in_force(decoder, options);
      CHECK_EQ(std::ranges::count(names, std::string_view(name), &Option::name),
               decoders.count(decoder));
      if (decoders.contains(decoder)) {
        check_effect({.options = asked}, decoder, options, 100);
      } else {
        CHECK_THROWS_WITH(
            check_effect({.options = asked}, decoder, options, 100),
            format("`{}` has no effect with decoder \"{}\": leave it out", name, decoder));
      }
    }
  }
}

TEST(request_options_that_the_rule_does_not_read) {
  const DecoderOptions file = with_mask();
  CHECK_THROWS_WITH(effect({{"proxy", "margin"}, {"factor", 2.0f}}, "sbd", file),
                    "`proxy` has no effect with unmask factor: leave it out, or use `unmask` "
                    "entropy_bounded, top_n");
  CHECK_THROWS_WITH(effect({{"unmask", "confidence"}, {"gamma", 0.5f}}, "sbd", file),
                    "`gamma` has no effect with unmask confidence: leave it out, or use `unmask` "
                    "entropy_bounded");
  CHECK_THROWS_WITH(effect({{"steps", 2}, {"gamma", 0.5f}}, "sbd", file),
                    "`steps` has no effect with unmask");
  CHECK_THROWS_WITH(effect({{"gamma", 0.5f}, {"top_n", 2}}, "sbd", file),
                    "use `unmask` confidence, top_n");
  CHECK_THROWS_WITH(effect({{"unmask", "top_n"}, {"factor", 2.0f}}, "sbd", file),
                    "`factor` has no effect");
  CHECK_THROWS_WITH(effect({{"unmask", "top_n"}, {"confidence_threshold", 0.5f}}, "sbd", file),
                    "use `unmask` conf");
  CHECK_THROWS_WITH(effect({{"steps", 2}, {"top_n", 2}}, "sbd", file),
                    "`top_n` has no effect beside `steps`");
  effect({{"unmask", "confidence"}, {"confidence_threshold", 0.5f}, {"top_n", 2}}, "sbd", file);
  effect({{"unmask", "top_n"}, {"proxy", "position"}, {"top_n", 2}}, "sbd", file);
  effect({{"steps", 2}, {"unmask", "confidence"}}, "sbd", file);
}

TEST(request_what_an_option_without_effect_belongs_to) {
  DecoderOptions file = with_mask();
  CHECK_THROWS_WITH(effect({{"horizon", 2}}, "sbd", file), "leave it out");
  file.has_layer_cut = true;
  CHECK_THROWS_WITH(effect({{"horizon", 2}}, "sbd", file), "leave it out, or use `decoder` dmtd");
  CHECK_THROWS_WITH(effect({{"gamma", 0.5f}}, "ntp", file),
                    "leave it out, or use `decoder` sbd, sbd_lossless");
}

TEST(request_filters_need_a_temperature) {
  CHECK_THROWS_WITH(check_effect({.top_k = 5}, "ntp", {}, 100),
                    "`top_k` has no effect at temperature 0");
  CHECK_THROWS_WITH(check_effect({.top_p = 0.5f}, "ntp", {}, 100),
                    "`top_p` has no effect at temperature 0");
  CHECK_THROWS_WITH(check_effect({.min_p = 0.5f}, "ntp", {}, 100),
                    "`min_p` has no effect at temperature 0");
  check_effect({.temperature = 0.5f, .top_p = 0.5f, .top_k = 5, .min_p = 0.5f}, "ntp", {}, 100);
}

TEST(request_task) {
  ModelConfig config;
  config.vocab_size = 100;
  config.eos_token_ids = {kEos};
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

// --- Which decoders a file can run ---

TEST(request_families_need_a_file_of_theirs) {
  DecoderOptions file = with_mask();
  file.named = {"sbd", "ntp"};
  for (const char* family : {"nemotron", "sdar", "fast_dllm_v2", "llada", "dream"}) {
    CHECK_THROWS_WITH(make_decoder(family, task({1}, 9), file),
                      "needs a model of that family, whose file says how it is decoded; this one "
                      "names: sbd, ntp");
    DecoderOptions own = file;
    own.named.push_back(family);
    CHECK(make_decoder(family, task({1}, 9), own) != nullptr);
    own.has_mask_token = false;
    CHECK_THROWS_WITH(make_decoder(family, task({1}, 9), own),
                      "needs a mask token and the model file names none");
  }
}

// A family's loop looks past an EOS, SBD does not; SBD seeds nothing.
TEST(request_families_loops_are_not_sbds) {
  DecoderOptions file = with_mask();
  file.named = {"nemotron", "sbd"};
  file.block.seed_slot = true;
  file.block.block_size = 4;
  file.block.unmask.rule = UnmaskRule::top_n;
  const auto family = make_decoder("nemotron", task({1}, 9), file);
  CHECK_EQ(text(family->plan({})), "[1 causal commit > 0]");
  CHECK_EQ(absorb(*family, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(absorb(*family, {row(11, 2), row(kEos, 1), row(13, 3)}), "2:7 | |");
  CHECK_EQ(text(family->plan({})), "[10 _ 7 _ block scratch > 1 3]");

  const auto sbd = make_decoder("sbd", task({1}, 9), file);
  CHECK_EQ(text(sbd->plan({})), "[1 causal commit] [_ _ _ _ block scratch > 0 1 2 3]");
  CHECK_EQ(absorb(*sbd, {row(10, 3), row(11, 2), row(kEos, 1), row(13, 4)}), "2:7 | |");
  CHECK_EQ(text(sbd->plan({})), "[_ _ 7 _ block scratch > 0 1]");
}

TEST(request_sbd_of_shifted_logits) {
  DecoderOptions file = with_mask();
  file.named = {"fast_dllm_v2", "ntp"};
  file.block.logit_shift = 1;
  file.block.seed_slot = true;
  CHECK_THROWS_WITH(make_decoder("sbd", task({1}, 9), file),
                    "fuses a block's commit with the next block, whose first token this model "
                    "predicts from that commit: use fast_dllm_v2, ntp");
  file.named = {"sbd", "sdar"};
  CHECK_THROWS_WITH(make_decoder("sbd", task({1}, 9), file), "from that commit: use sdar");
  file.named = {"sbd"};
  CHECK_THROWS_WITH(make_decoder("sbd", task({1}, 9), file), "from that commit: use ntp");
  file.block.seed_slot = false;
  file.block.prompt_attention = PromptAttention::full;
  file.block.commit_attention = CommitAttention::none;
  CHECK(make_decoder("sbd", task({1}, 9), file) != nullptr);
  file.block.block_size.reset();
  CHECK(make_decoder("sbd", task({1}, 9), file) != nullptr);
  CHECK_THROWS_WITH(make_decoder("d2f", task({1}, 9), file),
                    "decoder \"d2f\" needs a block size and the model file names none");
}

TEST(request_able_decoders) {
  using Names = std::vector<std::string>;
  CHECK_EQ(able_decoders({}, 100), Names{"ntp"});
  DecoderOptions cut;
  cut.has_layer_cut = true;
  CHECK_EQ(able_decoders(cut, 100), (Names{"ntp", "dmtd"}));
  DecoderOptions file = with_mask();
  file.named = {"sdar", "ntp"};
  CHECK_EQ(able_decoders(file, 100),
           (Names{"ntp", "sbd", "sbd_lossless", "d2f", "nemotron_spec", "sdar"}));
  CHECK_EQ(able_decoders(file, kBlockSize - 1), Names{"ntp"});
  file.block.commit_attention = CommitAttention::block;
  CHECK_EQ(able_decoders(file, 100), (Names{"ntp", "sbd", "d2f", "sdar"}));
  CHECK(!refusal("sbd", file, 100));
  CHECK_EQ(
      refusal("sbd_lossless", file, 100).value(),
      "decoder \"sbd_lossless\" verifies by causal rows, and this model's cache is not causal");
  file.block.logit_shift = 1;
  CHECK_EQ(able_decoders(file, 100), (Names{"ntp", "d2f"}));
}

}  // namespace
}  // namespace sbd
