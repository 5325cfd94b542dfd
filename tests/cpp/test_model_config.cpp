// Metadata to ModelConfig and DecoderOptions: defaults, families, and each disagreement's own line.
#include <cmath>
#include <map>

#include "check.h"
#include "decode_defaults.h"
#include "format/model_config.h"

namespace {

using namespace sbd;

using Changes = std::map<std::string, MetadataValue>;
using Strings = std::vector<std::string>;
using Integers = std::vector<std::int64_t>;

std::int64_t operator""_i(unsigned long long value) { return static_cast<std::int64_t>(value); }

// A complete file's keys ("*." stands for the architecture), with changes; `without` is left out.
Metadata metadata(const Changes& changes = {}, const std::string& without = "",
                  const std::string& architecture = "llama") {
  Changes keys = {
      {"general.architecture", architecture},
      {"*.block_count", 2_i},
      {"*.embedding_length", 64_i},
      {"*.feed_forward_length", 96_i},
      {"*.context_length", 128_i},
      {"*.attention.head_count", 4_i},
      {"*.attention.layer_norm_rms_epsilon", 1e-5},
      {"*.vocab_size", 100_i},
  };
  for (const auto& [key, value] : changes) {
    keys.insert_or_assign(key, value);
  }
  Metadata out("model.bin");
  for (const auto& [key, value] : keys) {
    if (key != without) {
      out.set(key.starts_with("*.") ? architecture + key.substr(1) : key, value);
    }
  }
  return out;
}

ModelConfig read(const Changes& changes = {}, const std::string& without = "") {
  return read_model_config(metadata(changes, without));
}

// With a mask token.
DecoderOptions read_defaults(Changes changes = {}) {
  changes.insert({"sbd.mask_token_id", 99_i});
  const Metadata keys = metadata(changes);
  return read_decode_defaults(keys, read_model_config(keys));
}

}  // namespace

TEST(metadata_access_is_typed) {
  Metadata keys("model.bin");
  keys.set("whole", 3_i);
  keys.set("half", 0.5);
  keys.set("word", std::string("text"));
  keys.set("words", Strings{"a", "b"});
  keys.set("yes", true);
  keys.set("ids", Integers{1, 2, 3});
  CHECK_EQ(keys.integer("whole", 3, 3), 3);
  CHECK_EQ(keys.number("whole"), 3.0);
  CHECK_EQ(keys.number("half"), 0.5);
  CHECK_EQ(keys.string("word"), "text");
  CHECK_EQ(keys.strings("words").size(), 2);
  CHECK_EQ(keys.integers("ids").back(), 3);
  CHECK(keys.boolean("yes"));
  CHECK(keys.contains("half"));
  CHECK(!keys.contains("hal"));
  CHECK_THROWS_WITH(keys.integer("none", 0, 1),
                    "model.bin: key 'none' is missing, expected an integer");
  CHECK_THROWS_WITH(keys.integer("whole", 4, 9), "model.bin: key 'whole' is 3, expected 4 to 9");
  CHECK_THROWS_WITH(keys.integer("whole", 0, 2), "key 'whole' is 3, expected 0 to 2");
  CHECK_THROWS_WITH(keys.integer("half", 0, 1), "key 'half' is the float 0.5, expected an integer");
  CHECK_THROWS_WITH(keys.number("word"), "key 'word' is the string 'text', expected a number");
  CHECK_THROWS_WITH(keys.string("words"),
                    "key 'words' is an array of 2 strings, expected a string");
  CHECK_THROWS_WITH(keys.strings("ids"),
                    "key 'ids' is an array of 3 integers, expected an array of strings");
  CHECK_THROWS_WITH(keys.integers("yes"),
                    "key 'yes' is the boolean true, expected an array of integers");
  CHECK_THROWS_WITH(keys.boolean("whole"), "key 'whole' is the integer 3, expected a boolean");
  CHECK_THROWS_WITH(keys.set("yes", 1_i), "model.bin: key 'yes' appears twice, expected once");
}

TEST(config_reads_every_key) {
  const ModelConfig config = read({{"*.attention.head_count_kv", 2_i},
                                   {"*.attention.key_length", 32_i},
                                   {"*.attention.value_length", 32_i},
                                   {"*.rope.dimension_count", 32_i},
                                   {"*.rope.freq_base", 1e6},
                                   {"*.rope.scaling.type", std::string("linear")},
                                   {"*.rope.scaling.factor", 4.0},
                                   {"*.attention.sliding_window", 50_i},
                                   {"sbd.eos_token_ids", Integers{5, 7, 5}},
                                   {"sbd.mask_token_id", 99_i},
                                   {"tokenizer.ggml.mask_token_id", 98_i},
                                   {"tokenizer.ggml.eos_token_id", 6_i}});
  CHECK_EQ(config.architecture, "llama");
  CHECK_EQ(config.num_hidden_layers, 2);
  CHECK_EQ(config.hidden_size, 64);
  CHECK_EQ(config.intermediate_size, 96);
  CHECK_EQ(config.num_attention_heads, 4);
  CHECK_EQ(config.num_key_value_heads, 2);
  CHECK_EQ(config.head_dim, 32);
  CHECK_EQ(config.vocab_size, 100);
  CHECK_EQ(config.max_position_embeddings, 128);
  CHECK_EQ(config.sliding_window, 50);
  CHECK_EQ(config.rms_norm_eps, 1e-5f);
  CHECK_EQ(config.rope_theta, 1e6);
  CHECK_EQ(config.rope_linear_factor, 4.0);
  CHECK_EQ(config.eos_token_ids, (std::vector<TokenId>{5, 7}));
  CHECK_EQ(config.mask_token_id.value_or(-1), 99);
}

TEST(config_defaults) {
  const ModelConfig config = read();
  CHECK_EQ(config.num_key_value_heads, 4);
  CHECK_EQ(config.head_dim, 16);
  CHECK_EQ(config.rope_theta, 10000.0);
  CHECK_EQ(config.rope_linear_factor, 1.0);
  CHECK_EQ(config.sliding_window, 0);
  CHECK(config.eos_token_ids.empty());
  CHECK(!config.mask_token_id.has_value());
}

TEST(config_families_differ_in_flags) {
  const auto flags = [](const char* architecture) {
    const ModelConfig config = read_model_config(metadata({}, "", architecture));
    CHECK_EQ(config.architecture, architecture);
    return std::vector<bool>{config.rope_interleaved, config.attention_bias, config.qk_norm};
  };
  CHECK_EQ(flags("llama"), (std::vector<bool>{true, false, false}));
  CHECK_EQ(flags("qwen2"), (std::vector<bool>{false, true, false}));
  CHECK_EQ(flags("qwen3"), (std::vector<bool>{false, false, true}));
  CHECK_THROWS_WITH(
      read({{"general.architecture", std::string("gemma3")}}),
      "model.bin: key 'general.architecture' is 'gemma3', expected one of: llama, qwen2, "
      "qwen3");
  CHECK_THROWS_WITH(read({}, "general.architecture"), "key 'general.architecture' is missing");
}

TEST(config_names_missing_keys) {
  for (const char* key :
       {"block_count", "embedding_length", "feed_forward_length", "context_length",
        "attention.head_count", "attention.layer_norm_rms_epsilon", "vocab_size"}) {
    CHECK_THROWS_WITH(read({}, std::string("*.") + key), format("key 'llama.{}' is missing", key));
  }
}

TEST(config_checks_ranges) {
  const std::pair<const char*, std::int64_t> most[] = {{"block_count", 4096},
                                                       {"embedding_length", 262144},
                                                       {"feed_forward_length", 1048576},
                                                       {"context_length", 134217728},
                                                       {"attention.head_count", 262144},
                                                       {"vocab_size", 4194304}};
  for (const auto& [key, high] : most) {
    for (const std::int64_t bad :
         {std::int64_t{0}, std::int64_t{-1}, high + 1, INT64_MAX, INT64_MIN}) {
      CHECK_THROWS_WITH(read({{std::string("*.") + key, bad}}),
                        format("key 'llama.{}' is {}, expected 1 to {}", key, bad, high));
    }
  }
  CHECK_THROWS_WITH(read({{"*.attention.sliding_window", INT64_MAX}}), "expected 0 to 2147483647");
  for (const double bad : {0.0, -1e-5, 1.0, 1e-50, HUGE_VAL, std::nan("")}) {
    CHECK_THROWS_WITH(read({{"*.attention.layer_norm_rms_epsilon", bad}}),
                      "key 'llama.attention.layer_norm_rms_epsilon' is ");
  }
}

TEST(config_checks_heads) {
  CHECK_THROWS_WITH(read({{"*.attention.head_count_kv", 3_i}}),
                    "key 'llama.attention.head_count_kv' is 3, expected a divisor of the 4 heads");
  CHECK_THROWS_WITH(read({{"*.attention.head_count_kv", 8_i}}),
                    "expected a divisor of the 4 heads");
  CHECK_THROWS_WITH(
      read({{"*.attention.head_count", 5_i}}),
      "key 'llama.attention.head_count' is 5, expected a divisor of embedding_length 64");
  CHECK_EQ(read({{"*.attention.head_count", 5_i}, {"*.attention.key_length", 16_i}}).head_dim, 16);
  CHECK_THROWS_WITH(read({{"*.attention.key_length", 17_i}}),
                    "key 'llama.attention.key_length' is 17, expected an even number");
  CHECK_THROWS_WITH(read({{"*.attention.head_count", 64_i}}),
                    "key 'llama.attention.key_length' is 1, expected an even number");
  CHECK_THROWS_WITH(read({{"*.attention.key_length", 65538_i}}),
                    "key 'llama.attention.key_length' is 65538, expected 1 to 65536");
  CHECK_THROWS_WITH(read({{"*.attention.value_length", 32_i}}),
                    "key 'llama.attention.value_length' is 32, expected 16 as the head's size");
  CHECK_THROWS_WITH(read({{"*.rope.dimension_count", 8_i}}),
                    "key 'llama.rope.dimension_count' is 8, expected 16 as the head's size");
}

TEST(config_checks_rope) {
  for (const double bad : {0.0, -1.0, HUGE_VAL, std::nan("")}) {
    CHECK_THROWS_WITH(read({{"*.rope.freq_base", bad}}), "key 'llama.rope.freq_base' is ");
    CHECK_THROWS_WITH(read({{"*.rope.scaling.factor", bad}}),
                      "key 'llama.rope.scaling.factor' is ");
  }
  CHECK_THROWS_WITH(
      read({{"*.rope.scaling.type", std::string("longrope")}}),
      "key 'llama.rope.scaling.type' is 'longrope', expected one of: none, linear, yarn");
  for (const char* type : {"linear", "yarn"}) {
    CHECK_THROWS_WITH(read({{"*.rope.scaling.type", std::string(type)}}),
                      format("key 'llama.rope.scaling.type' is '{}', expected 'none', or the key "
                             "'llama.rope.scaling.factor' too",
                             type));
  }
  CHECK_EQ(read({{"*.rope.scaling.type", std::string("none")}}).rope_linear_factor, 1.0);
  CHECK_EQ(read({{"*.rope.scaling.factor", 2_i}}).rope_linear_factor, 2.0);
  CHECK_EQ(read({{"*.rope.scale_linear", 8.0}}).rope_linear_factor, 8.0);
}

TEST(config_reads_yarn) {
  const auto yarn = [](const std::map<std::string, double>& changes, double factor = 4.0) {
    Changes keys = {{"*.rope.scaling.type", std::string("yarn")},
                    {"*.rope.scaling.factor", factor}};
    for (const auto& [key, value] : changes) keys.insert({"*.rope.scaling." + key, value});
    return read(keys);
  };
  const ModelConfig plain = yarn({});
  CHECK_EQ(plain.rope_linear_factor, 1.0);
  CHECK_EQ(plain.yarn->factor, 4.0);
  CHECK_EQ(plain.yarn->original_length, 128);  // the context
  CHECK_EQ(plain.yarn->beta_fast, 32.0);
  CHECK_EQ(plain.yarn->beta_slow, 1.0);
  const double grown = 1 + 0.1 * std::log(4.0);
  CHECK_EQ(plain.rope_attention_factor, grown);
  CHECK_EQ(yarn({}, 0.5).rope_attention_factor, 1.0);
  CHECK_EQ(yarn({{"attn_factor", 0.5}}).rope_attention_factor, 0.5 * grown);
  CHECK_EQ(yarn({{"yarn_log_multiplier", 1.0}}).rope_attention_factor, 1.0);
  CHECK_EQ(yarn({{"yarn_beta_fast", 8.0}}).yarn->beta_fast, 8.0);
  CHECK_EQ(read({{"*.rope.scaling.attn_factor", 1.5}}).rope_attention_factor, 1.5);
  CHECK(!read({}).yarn);

  for (const double bad : {0.0, -1.0, HUGE_VAL, std::nan("")}) {
    CHECK_THROWS_WITH(yarn({}, bad), "key 'llama.rope.scaling.factor' is ");
    CHECK_THROWS_WITH(yarn({{"attn_factor", bad}}), "key 'llama.rope.scaling.attn_factor' is ");
    CHECK_THROWS_WITH(yarn({{"yarn_beta_slow", bad}}), ".yarn_beta_slow' is ");
  }
  CHECK_THROWS_WITH(yarn({{"yarn_beta_fast", 1.0}}), "is 1, expected more than yarn_beta_slow 1");
  CHECK_THROWS_WITH(yarn({{"yarn_log_multiplier", -1.0}}), "expected a finite number of at least");
  CHECK_THROWS_WITH(yarn({{"yarn_ext_factor", 0.0}}), "the engine lacks the operation");
}

TEST(config_reads_the_vocabulary_from_the_tokenizer) {
  const Strings tokens(30, "t");
  CHECK_EQ(read({{"tokenizer.ggml.tokens", tokens}}, "*.vocab_size").vocab_size, 30);
  CHECK_EQ(read({{"tokenizer.ggml.tokens", tokens}}).vocab_size, 100);
  CHECK_THROWS_WITH(read({{"tokenizer.ggml.tokens", tokens}, {"*.vocab_size", 29_i}}),
                    "key 'llama.vocab_size' is 29, expected at least the tokenizer's 30 tokens");
  CHECK_THROWS_WITH(read({{"tokenizer.ggml.tokens", std::string("t")}}),
                    "expected an array of strings");
}

TEST(config_reads_special_tokens) {
  const ModelConfig config = read({{"tokenizer.ggml.eos_token_id", 1_i},
                                   {"tokenizer.ggml.eot_token_id", 3_i},
                                   {"tokenizer.ggml.eom_token_id", 1_i},
                                   {"tokenizer.ggml.mask_token_id", 4_i}});
  CHECK_EQ(config.eos_token_ids, (std::vector<TokenId>{1, 3}));
  CHECK_EQ(config.mask_token_id.value_or(-1), 4);
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{100}, std::int64_t{4294967295}}) {
    CHECK_THROWS_WITH(read({{"sbd.eos_token_ids", Integers{0, bad}}}),
                      format("key 'sbd.eos_token_ids' has token id {}, expected 0 to 99", bad));
    CHECK_THROWS_WITH(
        read({{"tokenizer.ggml.eos_token_id", bad}}),
        format("key 'tokenizer.ggml.eos_token_id' has token id {}, expected 0 to 99", bad));
    CHECK_THROWS_WITH(read({{"sbd.mask_token_id", bad}}),
                      format("key 'sbd.mask_token_id' is {}, expected 0 to 99", bad));
  }
  CHECK_THROWS_WITH(read({{"sbd.eos_token_ids", Integers{9}}, {"sbd.mask_token_id", 9_i}}),
                    "key 'sbd.mask_token_id' is 9, expected a token that does not end the text");
}

TEST(config_knows_the_names_that_end_a_text) {
  using Ids = std::vector<TokenId>;
  const auto ends = [](const Strings& tokens, Changes changes = {}) {
    changes.insert({"tokenizer.ggml.tokens", tokens});
    return read(changes).eos_token_ids;
  };
  const Strings chat = {"<|im_start|>", "<|im_end|>", "a", "<|endoftext|>", "<|mask|>"};
  CHECK_EQ(ends(chat), (Ids{1, 3}));
  CHECK_EQ(ends(chat, {{"tokenizer.ggml.eos_token_id", 3_i}}), (Ids{3, 1}));
  CHECK_EQ(ends(chat, {{"tokenizer.ggml.mask_token_id", 3_i}}), (Ids{1}));
  CHECK_EQ(ends({"<s>", "</s>", "<|fim_pad|>", "<|file_sep|>", "</s"}), (Ids{1, 2, 3}));
  CHECK_EQ(ends({"<|end|>", "<|return|>"}), (Ids{0, 1}));
  CHECK_EQ(ends({"<|end|>", "<|return|>", "<|call|>"}), (Ids{1, 2}));
  CHECK_EQ(ends({"</s>", "<|tool_response>"}), (Ids{1}));
  // The converter has asked all of a checkpoint's files.
  CHECK_EQ(ends(chat, {{"sbd.eos_token_ids", Integers{2}}}), (Ids{2}));
  CHECK_EQ(ends(chat, {{"tokenizer.huggingface.json", std::string("{}")}}), (Ids{}));
}

TEST(config_refuses_operations_the_forward_lacks) {
  CHECK_THROWS_WITH(read({{"*.expert_count", 8_i}}), "key 'llama.expert_count' is 8, expected 0");
  CHECK_EQ(read({{"*.expert_count", 0_i}}).num_hidden_layers, 2);
  CHECK_THROWS_WITH(read({{"*.logit_scale", 0.5}}), "key 'llama.logit_scale' is 0.5, expected 1");
  CHECK_THROWS_WITH(read({{"*.final_logit_softcapping", 30.0}}),
                    "key 'llama.final_logit_softcapping' is 30, expected 0");
  CHECK_THROWS_WITH(read({{"*.attention.causal", false}}),
                    "key 'llama.attention.causal' is false, expected true");
  CHECK_EQ(read({{"*.attention.causal", true}}).num_hidden_layers, 2);
}

TEST(defaults_without_keys_are_ntp) {
  const DecoderOptions defaults = read_defaults();
  CHECK_EQ(defaults.named, Strings{"ntp"});
  CHECK_EQ(defaults.block.block_size.value(), 16);
  CHECK(!defaults.block.sub_block_size && !defaults.block.steps);
  CHECK(!read_defaults({{"sbd.prompt_attention", std::string("full")}}).block.block_size);
  CHECK_EQ(read_defaults({{"*.context_length", 9_i}}).block.block_size.value(), 9);
  CHECK_EQ(defaults.block.unmask.rule, UnmaskRule::entropy_bounded);
  CHECK(!defaults.block.unmask.proxy);  // the rule's own
  CHECK_EQ(defaults.block.unmask.gamma, 0.35f);
  CHECK_EQ(defaults.block.unmask.factor, 1.0f);
  CHECK_EQ(defaults.block.unmask.confidence_threshold, 0.9f);
  CHECK_EQ(defaults.block.unmask.top_n, 1);
}

TEST(defaults_read_every_key) {
  const DecoderOptions defaults = read_defaults({{"sbd.decoders", Strings{"ntp", "sbd"}},
                                                 {"sbd.block_size", 8_i},
                                                 {"sbd.unmask", std::string("top_n")},
                                                 {"sbd.proxy", std::string("margin")},
                                                 {"sbd.gamma", HUGE_VAL},
                                                 {"sbd.factor", 2_i},
                                                 {"sbd.confidence_threshold", 0.5},
                                                 {"sbd.top_n", 3_i},
                                                 {"sbd.sub_block_size", 4_i},
                                                 {"sbd.steps", 5_i},
                                                 {"sbd.schedule", std::string("linear")},
                                                 {"sbd.logit_shift", 1_i},
                                                 {"sbd.seed_slot", 1_i},
                                                 {"sbd.block_origin", std::string("absolute")},
                                                 {"sbd.prompt_attention", std::string("full")},
                                                 {"sbd.commit_attention", std::string("none")},
                                                 {"sbd.dmtd.horizon", 3_i},
                                                 {"sbd.dmtd.prompt_rule", std::string("train")},
                                                 {"sbd.d2f.block_add_threshold", 0.25},
                                                 {"sbd.d2f.decoded_token_threshold", 1_i},
                                                 {"sbd.d2f.skip_threshold", 0.75}});
  CHECK_EQ(defaults.named, (Strings{"ntp", "sbd"}));
  CHECK_EQ(defaults.block.block_size.value(), 8);
  CHECK_EQ(defaults.block.unmask.rule, UnmaskRule::top_n);
  CHECK(defaults.block.unmask.proxy == Proxy::margin);
  CHECK_EQ(defaults.block.unmask.gamma, HUGE_VALF);
  CHECK_EQ(defaults.block.unmask.factor, 2.0f);
  CHECK_EQ(defaults.block.unmask.confidence_threshold, 0.5f);
  CHECK_EQ(defaults.block.unmask.top_n, 3);
  CHECK_EQ(defaults.block.sub_block_size.value(), 4);
  CHECK_EQ(defaults.block.steps.value(), 5);
  CHECK_EQ(defaults.block.schedule, Schedule::linear);
  CHECK_EQ(defaults.block.logit_shift, 1);
  CHECK(defaults.block.seed_slot);
  CHECK(defaults.block.absolute_blocks);
  CHECK_EQ(defaults.block.prompt_attention, PromptAttention::full);
  CHECK_EQ(defaults.block.commit_attention, CommitAttention::none);
  CHECK_EQ(defaults.dmtd.horizon, 3);
  CHECK_EQ(defaults.dmtd.prompt_rule, DmtdPromptRule::train);
  CHECK_EQ(defaults.d2f.block_add_threshold, 0.25f);
  CHECK_EQ(defaults.d2f.decoded_token_threshold, 1.0f);
  CHECK_EQ(defaults.d2f.skip_threshold, 0.75f);
  CHECK_EQ(read_defaults({{"sbd.gamma", 1e300}}).block.unmask.gamma, HUGE_VALF);
  CHECK_EQ(read_defaults({{"sbd.gamma", 0_i}}).block.unmask.gamma, 0.0f);
  // A name that the key had before.
  CHECK_EQ(read_defaults({{"sbd.threshold", 0.25}}).block.unmask.confidence_threshold, 0.25f);
  CHECK_THROWS_WITH(
      read_defaults({{"sbd.threshold", 0.25}, {"sbd.confidence_threshold", 0.25}}),
      "key 'sbd.threshold' is the older name of 'sbd.confidence_threshold', which is there too");
}

TEST(defaults_choose_sbd_where_block_size_and_mask_are_there) {
  CHECK_EQ(read_defaults({{"sbd.block_size", 8_i}}).named, (Strings{"sbd", "ntp"}));
  const Metadata no_mask = metadata({{"sbd.block_size", 8_i}});
  CHECK_EQ(read_decode_defaults(no_mask, read_model_config(no_mask)).named, Strings{"ntp"});
}

TEST(defaults_check_ranges) {
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-4}, std::int64_t{129}}) {
    CHECK_THROWS_WITH(read_defaults({{"sbd.block_size", bad}}),
                      format("key 'sbd.block_size' is {}, expected 1 to 128", bad));
  }
  for (const double bad : {-0.1, -HUGE_VAL, std::nan("")}) {
    CHECK_THROWS_WITH(read_defaults({{"sbd.gamma", bad}}), "key 'sbd.gamma' is ");
    CHECK_THROWS_WITH(read_defaults({{"sbd.factor", bad}}), "key 'sbd.factor' is ");
    CHECK_THROWS_WITH(read_defaults({{"sbd.threshold", bad}}), "key 'sbd.threshold' is ");
  }
  CHECK_THROWS_WITH(read_defaults({{"sbd.factor", 0.0}}),
                    "key 'sbd.factor' is 0, expected above 0");
  CHECK_THROWS_WITH(read_defaults({{"sbd.threshold", 1.5}}),
                    "key 'sbd.threshold' is 1.5, expected from 0 to 1");
  CHECK_THROWS_WITH(read_defaults({{"sbd.top_n", 0_i}}), "key 'sbd.top_n' is 0, expected 1 to");
  CHECK_THROWS_WITH(
      read_defaults({{"sbd.unmask", std::string("eb")}}),
      "key 'sbd.unmask' is 'eb', expected one of: entropy_bounded, factor, confidence, top_n");
  CHECK_THROWS_WITH(read_defaults({{"sbd.proxy", std::string("x")}}),
                    "key 'sbd.proxy' is 'x', expected one of: entropy, confidence, margin");
  CHECK_THROWS_WITH(read_defaults({{"sbd.decoders", Strings{"beam"}}}),
                    "key 'sbd.decoders' is 'beam', expected one of: ntp, sbd, sbd_lossless, dmtd");
  for (const char* key : {"logit_shift", "seed_slot"}) {
    CHECK_THROWS_WITH(read_defaults({{std::string("sbd.") + key, 2_i}}), "is 2, expected 0 to 1");
  }
  for (const char* key :
       {"schedule", "block_origin", "prompt_attention", "commit_attention", "dmtd.prompt_rule"}) {
    CHECK_THROWS_WITH(read_defaults({{std::string("sbd.") + key, std::string("x")}}),
                      format("key 'sbd.{}' is 'x', expected one of: ", key));
  }
  for (const char* key : {"block_add_threshold", "decoded_token_threshold", "skip_threshold"}) {
    CHECK_THROWS_WITH(read_defaults({{std::string("sbd.d2f.") + key, 1.5}}),
                      "expected from 0 to 1");
  }
  CHECK_THROWS_WITH(read_defaults({{"sbd.block_size", 8_i}, {"sbd.sub_block_size", 3_i}}),
                    "key 'sbd.sub_block_size' is 3, expected a divisor of block_size 8");
  CHECK_THROWS_WITH(read_defaults({{"sbd.dmtd.horizon", 0_i}}), "expected 1 to");
  CHECK_THROWS_WITH(read_defaults({{"sbd.decoders", Strings{"ntp", "ntp"}}}), "is 'ntp' twice");
  CHECK_THROWS_WITH(read_defaults({{"sbd.decoders", Strings{}}}), "is an empty array");
}

TEST(defaults_know_every_name) {
  for (const std::string& decoder : decoder_names()) {
    CHECK_EQ(
        read_defaults({{"sbd.decoders", Strings{decoder}}, {"sbd.dmtd.layers", Integers{0, 1, 1}}})
            .named,
        Strings{decoder});
  }
  for (const auto& [name, rule] : kUnmaskRules) {
    CHECK_EQ(read_defaults({{"sbd.unmask", std::string(name)}}).block.unmask.rule, rule);
  }
  for (const auto& [name, proxy] : kProxies) {
    CHECK(read_defaults({{"sbd.proxy", std::string(name)}}).block.unmask.proxy == proxy);
  }
}

TEST(defaults_tell_what_the_model_has) {
  const Metadata plain = metadata();
  const DecoderOptions none = read_decode_defaults(plain, read_model_config(plain));
  CHECK(!none.has_mask_token && !none.has_layer_cut && !none.has_adapter);
  const DecoderOptions cut = read_defaults({{"sbd.dmtd.layers", Integers{0, 1, 1}}});
  CHECK(cut.has_mask_token && cut.has_layer_cut);
  CHECK_EQ(cut.block.mask_token_id, 99);
}

TEST(layers_are_cut_for_direct_multi_token_decoding) {
  CHECK_EQ(read().layer_sections, (std::array<int, 3>{0, 0, 2}));
  CHECK_EQ(read({{"sbd.dmtd.layers", Integers{0, 1, 1}}}).layer_sections,
           (std::array<int, 3>{0, 1, 1}));
  for (const Integers& bad :
       {Integers{1, 1}, Integers{0, 1, 2}, Integers{0, 0, 2}, Integers{1, 1, 0}, Integers{},
        Integers{-1, 2, 1}, Integers{INT64_MAX, INT64_MAX, 4}}) {
    CHECK_THROWS_WITH(read({{"sbd.dmtd.layers", bad}}),
                      "thinking and decoding layers that add up to 2");
  }
}
