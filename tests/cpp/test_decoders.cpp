// The decoders without a model: scripted statistics drive them through hand-worked cases.
#include <limits>
#include <string>
#include <vector>

#include "decode/ntp.h"
#include "decode/registry.h"
#include "decode/set_block.h"
#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

SetBlockDecoder set_block(const DecodeTask& task, int block_size, const Unmask& unmask) {
  return {task, {.mask_token_id = kMask, .block_size = block_size, .unmask = unmask}};
}

// --- NTP ---

TEST(ntp_decodes_a_token_per_forward) {
  NtpDecoder decoder(task({1, 2, 3}, 3));
  CHECK_EQ(text(decoder.plan({})), "[1 2 3 causal commit > 2]");
  CHECK_EQ(text(decoder.plan({})), "[1 2 3 causal commit > 2]");  // planning changes nothing
  CHECK_EQ(absorb(decoder, {row(4)}), "0:4 | 4 |");
  CHECK_EQ(text(decoder.plan({})), "[4 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(5)}), "1:5 | 5 |");
  CHECK_EQ(text(decoder.plan({})), "[5 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(6)}), "2:6 | 6 | length");
}

TEST(ntp_prefills_in_chunks) {
  DecodeTask long_prompt = task({1, 2, 3, 4, 5}, 2);
  NtpDecoder decoder(long_prompt);
  CHECK_EQ(text(decoder.plan({2})), "[1 2 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| |");
  CHECK_EQ(text(decoder.plan({2})), "[3 4 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| |");
  CHECK_EQ(text(decoder.plan({2})), "[5 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(6)}), "0:6 | 6 |");

  CHECK_EQ(text(NtpDecoder(long_prompt).plan({5})), "[1 2 3 4 5 causal commit > 4]");
  CHECK_EQ(text(NtpDecoder(long_prompt).plan({4})), "[1 2 3 4 causal commit]");
}

TEST(ntp_ends) {
  NtpDecoder stopped(task({1}, 5));
  CHECK_EQ(absorb(stopped, {row(4)}), "0:4 | 4 |");
  CHECK_EQ(absorb(stopped, {row(kEos)}), "1:7 | 7 | stop");

  NtpDecoder last(task({1}, 1));  // the last token wanted is an EOS
  CHECK_EQ(absorb(last, {row(kEos)}), "0:7 | 7 | stop");

  DecodeTask full = task({1, 2, 3}, 50);
  full.n_ctx = 5;
  NtpDecoder context(full);
  CHECK_EQ(absorb(context, {row(4)}), "0:4 | 4 |");
  CHECK_EQ(absorb(context, {row(5)}), "1:5 | 5 | length");

  DecodeTask ignoring = task({1}, 2);
  ignoring.eos_token_ids = {};
  NtpDecoder on(ignoring);
  CHECK_EQ(absorb(on, {row(kEos)}), "0:7 | 7 |");

  DecodeTask several = task({1}, 9);
  several.eos_token_ids = {kEos, 8};
  NtpDecoder either(several);
  CHECK_EQ(absorb(either, {row(8)}), "0:8 | 8 | stop");
}

TEST(ntp_samples_above_temperature_zero) {
  DecodeTask sampled = task({1}, 5);
  sampled.sampling = {
      .temperature = 0.5f, .top_k = 3, .top_p = 0.75f, .seed = 11, .sample_index = 2};
  NtpDecoder decoder(sampled);
  CHECK_EQ(absorb(decoder, {row(4)}), "0:104 | 104 |");
  const Sampling sampling = last_sampling(decoder);
  CHECK_EQ(sampling.temperature, 0.5f);
  CHECK_EQ(sampling.top_k, 3);
  CHECK_EQ(sampling.top_p, 0.75f);
  CHECK_EQ(sampling.seed, 11);
  CHECK_EQ(sampling.sample_index, 2);
  CHECK_EQ(sampling.draw, 0);  // every position is drawn once
}

// --- Set Block Decoding ---

TEST(sbd_commits_a_block_in_front_of_the_next) {
  SetBlockDecoder decoder = set_block(task({1, 2}, 6), 3, gamma(0.5f));
  CHECK_EQ(text(decoder.plan({})), "[1 2 causal commit] [_ _ _ block scratch > 0 1 2]");
  CHECK_EQ(text(decoder.plan({})), "[1 2 causal commit] [_ _ _ block scratch > 0 1 2]");
  // Ascending 0.25 (2), 0.75 (0), 2 (1): sums before the last 0, 0.25, 1.
  CHECK_EQ(absorb(decoder, {row(10, 0.75f), row(11, 2.0f), row(12, 0.25f)}),
           "0:10 2:12 | 10 |");  // out of order: only the prefix is text
  CHECK_EQ(text(decoder.plan({})), "[10 _ 12 block scratch > 1]");
  CHECK_EQ(absorb(decoder, {row(13)}), "1:13 | 13 12 |");
  CHECK_EQ(text(decoder.plan({})), "[10 13 12 causal commit] [_ _ _ block scratch > 0 1 2]");
  CHECK_EQ(absorb(decoder, {row(14, 0.1f), row(15, 0.1f), row(16, 0.1f)}),
           "3:14 4:15 5:16 | 14 15 16 | length");  // no forward to commit it
}

TEST(sbd_prefills_in_chunks_and_fuses_the_last) {
  DecodeTask long_prompt = task({1, 2, 3, 4, 5}, 4);
  SetBlockDecoder decoder = set_block(long_prompt, 3, gamma(kInf));
  CHECK_EQ(text(decoder.plan({2})), "[1 2 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| |");
  CHECK_EQ(text(decoder.plan({2})), "[3 4 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| |");
  CHECK_EQ(text(decoder.plan({2})), "[5 causal commit] [_ _ _ block scratch > 0 1 2]");
  const Sampling sampling = last_sampling(decoder);
  CHECK_EQ(sampling.draw, 0);  // chunks are not forwards of the block
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 11 12 |");
  // A decided block is not the prompt: it stays in one piece.
  CHECK_EQ(text(decoder.plan({2})), "[10 11 12 causal commit] [_ _ _ block scratch > 0]");

  CHECK_EQ(text(set_block(long_prompt, 2, gamma(0)).plan({7})),
           "[1 2 3 4 5 causal commit] [_ _ block scratch > 0 1]");
  // The block does not fit beside the whole prompt: a row is left to go with it.
  CHECK_EQ(text(set_block(long_prompt, 2, gamma(0)).plan({6})), "[1 2 3 4 causal commit]");
  CHECK_EQ(text(set_block(long_prompt, 2, gamma(0)).plan({3})), "[1 2 3 causal commit]");
}

TEST(sbd_last_block_keeps_its_rows_where_fewer_tokens_are_wanted) {
  SetBlockDecoder decoder = set_block(task({1}, 5), 3, gamma(kInf));
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 11 12 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 12 causal commit] [_ _ _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {row(13), row(14)}), "3:13 4:14 | 13 14 | length");
}

TEST(sbd_last_block_is_cut_where_the_context_ends) {
  DecodeTask full = task({1, 2}, 50);
  full.n_ctx = 7;  // room for 5 new tokens
  SetBlockDecoder decoder = set_block(full, 3, gamma(kInf));
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 11 12 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 12 causal commit] [_ _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {row(13), row(14)}), "3:13 4:14 | 13 14 | length");

  // Both at once: 4 tokens wanted, room for 5, so the last block has 2 rows and 1 candidate.
  full.max_tokens = 4;
  SetBlockDecoder both = set_block(full, 3, gamma(kInf));
  CHECK_EQ(absorb(both, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 11 12 |");
  CHECK_EQ(text(both.plan({})), "[10 11 12 causal commit] [_ _ block scratch > 0]");
  CHECK_EQ(absorb(both, {row(13)}), "3:13 | 13 | length");
}

TEST(sbd_eos_first_in_the_block) {
  SetBlockDecoder decoder = set_block(task({1}, 9), 3, gamma(kInf));
  CHECK_EQ(absorb(decoder, {row(kEos), row(11), row(12)}), "0:7 1:11 2:12 | 7 | stop");
}

TEST(sbd_eos_in_the_middle_waits_for_what_is_before_it) {
  SetBlockDecoder decoder = set_block(task({1}, 9), 4, top_n(1));
  CHECK_EQ(absorb(decoder, {row(10, 3), row(11, 2), row(kEos, 1), row(13, 4)}), "2:7 | |");
  // Position 3 is behind the EOS: no candidate, still a row of the block.
  CHECK_EQ(text(decoder.plan({})), "[_ _ 7 _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {row(10, 3), row(11, 2)}), "1:11 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 11 7 _ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 11 7 | stop");
}

TEST(sbd_eos_last_in_the_block) {
  SetBlockDecoder decoder = set_block(task({1}, 9), 3, gamma(kInf));
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(kEos)}), "0:10 1:11 2:7 | 10 11 7 | stop");

  SetBlockDecoder both = set_block(task({1}, 3), 3, gamma(kInf));  // EOS is the last token wanted
  CHECK_EQ(absorb(both, {row(10), row(11), row(kEos)}), "0:10 1:11 2:7 | 10 11 7 | stop");

  SetBlockDecoder beyond = set_block(task({1}, 2), 3, gamma(kInf));  // EOS where none is wanted
  CHECK_EQ(text(beyond.plan({})), "[1 causal commit] [_ _ _ block scratch > 0 1]");
}

TEST(sbd_eos_decided_after_later_positions_cuts_them) {
  SetBlockDecoder decoder = set_block(task({1}, 9), 4, top_n(1));
  CHECK_EQ(absorb(decoder, {row(10, 4), row(11, 3), row(12, 2), row(13, 1)}), "3:13 | |");
  CHECK_EQ(absorb(decoder, {row(10, 1), row(11, 3), row(12, 2)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "[10 _ _ 13 block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(kEos, 1), row(12, 2)}), "1:7 | 7 | stop");  // 12 and 13 are cut
}

TEST(sbd_the_first_of_several_eos_counts) {
  SetBlockDecoder decoder = set_block(task({1}, 9), 4, top_n(2));
  CHECK_EQ(absorb(decoder, {row(10, 4), row(kEos, 2), row(12, 3), row(kEos, 1)}), "1:7 3:7 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 7 _ 7 block scratch > 0]");
  CHECK_EQ(absorb(decoder, {row(kEos)}), "0:7 | 7 | stop");  // a still earlier one
}

TEST(sbd_ignores_eos_where_there_is_none) {
  DecodeTask ignoring = task({1}, 4);
  ignoring.eos_token_ids = {};
  SetBlockDecoder decoder = set_block(ignoring, 2, gamma(kInf));
  CHECK_EQ(absorb(decoder, {row(kEos), row(11)}), "0:7 1:11 | 7 11 |");
  CHECK_EQ(text(decoder.plan({})), "[7 11 causal commit] [_ _ block scratch > 0 1]");
}

TEST(sbd_block_of_one) {
  SetBlockDecoder decoder = set_block(task({1, 2}, 2), 1, gamma(0));
  CHECK_EQ(text(decoder.plan({})), "[1 2 causal commit] [_ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "[10 causal commit] [_ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 | length");
}

TEST(sbd_gamma_zero_decides_one_position_per_forward) {
  SetBlockDecoder decoder = set_block(task({1}, 3), 3, gamma(0));
  CHECK_EQ(absorb(decoder, {row(10, 0.3f), row(11, 0.2f), row(12, 0.1f)}), "2:12 | |");
  CHECK_EQ(absorb(decoder, {row(10, 0.3f), row(11, 0.2f)}), "1:11 | |");
  CHECK_EQ(absorb(decoder, {row(10, 0.3f)}), "0:10 | 10 11 12 | length");
}

TEST(sbd_draws_anew_in_each_forward) {
  DecodeTask sampled = task({1}, 4);
  sampled.sampling = {
      .temperature = 0.5f, .top_k = 3, .top_p = 0.75f, .seed = 11, .sample_index = 2};
  SetBlockDecoder decoder = set_block(sampled, 2, top_n(1));
  Sampling sampling = last_sampling(decoder);
  CHECK_EQ(sampling.temperature, 0.5f);
  CHECK_EQ(sampling.top_k, 3);
  CHECK_EQ(sampling.top_p, 0.75f);
  CHECK_EQ(sampling.seed, 11);
  CHECK_EQ(sampling.sample_index, 2);
  CHECK_EQ(sampling.draw, 0);
  CHECK_EQ(absorb(decoder, {row(10, 1), row(11, 2)}), "0:110 | 110 |");
  sampling = last_sampling(decoder);
  CHECK_EQ(sampling.draw, 1);
  CHECK_EQ(sampling.seed, 11);
  CHECK_EQ(absorb(decoder, {row(kEos)}), "1:107 | 107 |");  // the token drawn counts, no EOS
  sampling = last_sampling(decoder);
  CHECK_EQ(sampling.draw, 0);  // other positions: counted from 0 again
}

TEST(statistics_must_fit_the_plan) {
  SetBlockDecoder block = set_block(task({1}, 9), 3, gamma(0));
  CHECK_THROWS_WITH(absorb(block, std::vector{row(4)}), "expected statistics of 3 rows, got 1");
  SetBlockDecoder masked = set_block(task({1}, 9), 1, gamma(0));
  CHECK_THROWS_WITH(absorb(masked, std::vector{row(kMask)}), "without the mask token 99");
  NtpDecoder ntp(task({1}, 9));
  CHECK_THROWS_WITH(absorb(ntp, {}), "expected statistics of 1 rows, got 0");
}

// --- The registry ---

DecoderOptions sbd_options(int block_size, const Unmask& unmask) {
  DecoderOptions options;
  options.block = {.mask_token_id = kMask, .block_size = block_size, .unmask = unmask};
  options.has_mask_token = true;
  return options;
}

TEST(registry_makes_decoders_by_name) {
  const DecoderOptions options = sbd_options(2, gamma(0));
  CHECK_EQ(text(make_decoder("ntp", task({1, 2}, 9), options)->plan({})),
           "[1 2 causal commit > 1]");
  const auto sbd = make_decoder("sbd", task({1}, 9), options);
  CHECK_EQ(text(sbd->plan({})), "[1 causal commit] [_ _ block scratch > 0 1]");
  CHECK_EQ(absorb(*sbd, {row(10, 2), row(11, 1)}), "1:11 | |");  // the rule given, not another
  // What a method does not use, it does not check.
  CHECK(make_decoder("ntp", task({1}, 9), sbd_options(1000, {})) != nullptr);
}

TEST(registry_errors) {
  const DecodeTask good = task({1}, 9);
  DecoderOptions options = sbd_options(16, {});
  CHECK_THROWS_WITH(make_decoder("beam", good, options),
                    "unknown `decoder` \"beam\": expected one of ntp, sbd, sbd_lossless, ");
  options.has_mask_token = false;
  CHECK_THROWS_WITH(make_decoder("sbd", good, options), "convert the model with --mask-token");
  options = sbd_options(0, {});
  CHECK_THROWS_WITH(make_decoder("sbd", good, options),
                    "expected `block_size` from 1 to 1024, got 0");
  options.block.block_size = 101;
  CHECK_THROWS_WITH(make_decoder("sbd", good, options), "got 101");
  options.block.block_size = 100;
  CHECK(make_decoder("sbd", good, options) != nullptr);
  options.block.unmask.gamma = -1.0f;
  CHECK_THROWS_WITH(make_decoder("sbd", good, options), "expected `gamma` >= 0");
}

TEST(tasks_are_checked) {
  const auto checked = [](const Tokens& prompt, int max_tokens, const Sampling& sampling = {}) {
    DecodeTask bad = task(prompt, max_tokens);
    bad.sampling = sampling;
    return make_decoder("ntp", bad, {}) != nullptr;
  };
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(checked(Tokens(99, 1), 1, {.temperature = 2.0f, .top_k = 5, .top_p = 1.0f}));
  CHECK_THROWS_WITH(checked({}, 9), "prompt of at least one token");
  CHECK_THROWS_WITH(checked(Tokens(100, 1), 9),
                    "shorter than the context of 100 tokens, got 100 tokens");
  CHECK_THROWS_WITH(checked({1}, 0), "expected `max_tokens` >= 1, got 0");
  CHECK_THROWS_WITH(checked({1}, 9, {.temperature = -0.5f}), "got -0.5");
  CHECK_THROWS_WITH(checked({1}, 9, {.temperature = nan}), "expected a finite `temperature`");
  CHECK_THROWS_WITH(checked({1}, 9, {.temperature = kInf}), "got inf");
  CHECK_THROWS_WITH(checked({1}, 9, {.top_k = -1}),
                    "expected `top_k` >= 0 (0 keeps all tokens), got -1");
  CHECK_THROWS_WITH(checked({1}, 9, {.top_p = 0.0f}), "at most 1 (1 keeps all tokens), got 0");
  CHECK_THROWS_WITH(checked({1}, 9, {.top_p = 1.5f}), "got 1.5");
  CHECK_THROWS_WITH(checked({1}, 9, {.top_p = nan}), "expected `top_p` above 0");
}

TEST(task_reveals_with_the_rows_figures) {
  DecodeTask any = task({1}, 9);
  RowStats stats = row(4, 0.5f);
  stats.sampled_probability = 0.125f;
  const Reveal greedy = any.reveal(3, stats);
  CHECK_EQ(greedy.position, 3);
  CHECK_EQ(greedy.token, 4);
  CHECK_EQ(greedy.entropy, 0.5f);
  CHECK_EQ(greedy.probability, stats.top_probability);
  any.sampling.temperature = 1.0f;
  CHECK_EQ(any.reveal(3, stats).token, 104);
  CHECK_EQ(any.reveal(3, stats).probability, 0.125f);
}

TEST(task_knows_how_many_tokens_fit) {
  DecodeTask limited = task({1, 2, 3}, 5);
  CHECK_EQ(limited.tokens_wanted(), 5);
  limited.n_ctx = 7;
  CHECK_EQ(limited.tokens_wanted(), 4);
}

}  // namespace
}  // namespace sbd
