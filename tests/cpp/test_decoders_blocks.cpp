// Set Block Decoding's loop as the block-diffusion families have it: hand-worked cases.
#include "decode/full_context.h"
#include "decode/set_block.h"
#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

SetBlockDecoder decoder_of(const DecodeTask& task, BlockMethod method) {
  method.mask_token_id = kMask;
  return {task, method};
}

DecodeTask with_context(DecodeTask task, int n_ctx) {
  task.n_ctx = n_ctx;
  return task;
}

// --- Where blocks begin, and how the prompt is read ---

// SDAR's form.
BlockMethod absolute(int block_size, const Unmask& unmask) {
  return {.block_size = block_size,
          .unmask = unmask,
          .absolute_blocks = true,
          .prompt_attention = PromptAttention::block_causal,
          .commit_attention = CommitAttention::block};
}

TEST(blocks_absolute_ones_open_with_the_prompts_tail) {
  SetBlockDecoder decoder = decoder_of(task({1, 2, 3, 4, 5, 6}, 5), absolute(4, gamma(kInf)));
  CHECK_EQ(text(decoder.plan({})), "[1 2 3 4 block commit] [5 6 _ _ block scratch > 2 3]");
  CHECK_EQ(absorb(decoder, {row(10), row(11)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[5 6 10 11 block commit] [_ _ _ _ block scratch > 0 1 2]");
  CHECK_EQ(absorb(decoder, {row(12), row(13), row(14)}), "2:12 3:13 4:14 | 12 13 14 | length");
}

TEST(blocks_absolute_ones_of_any_prompt_length) {
  // The first block holds all of the prompt: nothing is cached in front of it.
  SetBlockDecoder inside = decoder_of(task({1, 2, 3}, 5), absolute(4, gamma(kInf)));
  CHECK_EQ(text(inside.plan({})), "[1 2 3 _ block scratch > 3]");
  CHECK_EQ(absorb(inside, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(inside.plan({})), "[1 2 3 10 block commit] [_ _ _ _ block scratch > 0 1 2 3]");

  SetBlockDecoder whole = decoder_of(task({1, 2, 3, 4}, 5), absolute(4, gamma(kInf)));
  CHECK_EQ(text(whole.plan({})), "[1 2 3 4 block commit] [_ _ _ _ block scratch > 0 1 2 3]");

  SetBlockDecoder last = decoder_of(task({1, 2, 3, 4, 5}, 1), absolute(4, gamma(kInf)));
  CHECK_EQ(text(last.plan({})), "[1 2 3 4 block commit] [5 _ _ _ block scratch > 1]");
  CHECK_EQ(absorb(last, {row(10)}), "0:10 | 10 | length");

  SetBlockDecoder full =
      decoder_of(with_context(task({1, 2, 3, 4, 5}, 9), 7), absolute(4, gamma(kInf)));
  CHECK_EQ(text(full.plan({})), "[1 2 3 4 block commit] [5 _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(full, {row(10), row(11)}), "0:10 1:11 | 10 11 | length");
}

TEST(blocks_tokens_of_the_prompt_are_only_tokens) {
  // An EOS there ends nothing, a mask there is not decided and not seeded.
  SetBlockDecoder ended = decoder_of(task({1, 2, kEos}, 2), absolute(2, gamma(kInf)));
  CHECK_EQ(text(ended.plan({})), "[1 2 block commit] [7 _ block scratch > 1]");
  CHECK_EQ(absorb(ended, {row(10)}), "0:10 | 10 |");

  BlockMethod method = absolute(3, gamma(kInf));
  method.seed_slot = true;
  SetBlockDecoder masked = decoder_of(task({1, 2, 3, kMask}, 9), method);
  CHECK_EQ(text(masked.plan({})), "[1 2 3 block commit] [_ _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(masked, {row(10), row(11)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(masked.plan({})), "[_ 10 11 block commit > 2]");
}

TEST(blocks_block_causal_prompt_is_cut_between_its_blocks) {
  const BlockMethod method{.block_size = 3,
                           .unmask = gamma(kInf),
                           .prompt_attention = PromptAttention::block_causal,
                           .commit_attention = CommitAttention::block};
  const DecodeTask seven = task({1, 2, 3, 4, 5, 6, 8}, 4);
  SetBlockDecoder decoder = decoder_of(seven, method);
  CHECK_EQ(text(decoder.plan({})),
           "[1 2 3 block commit] [4 5 6 block commit] [8 block commit] [_ _ _ block scratch > 0 1 "
           "2]");
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 11 12 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 12 block commit] [_ _ _ block scratch > 0]");

  for (const int rows : {1, 3, 5}) {  // at least a block, no part of one
    SetBlockDecoder cut = decoder_of(seven, method);
    CHECK_EQ(text(cut.plan({rows})), "[1 2 3 block commit]");
    CHECK_EQ(absorb(cut, {}, rows), "| |");
    CHECK_EQ(text(cut.plan({rows})), "[4 5 6 block commit]");
    CHECK_EQ(absorb(cut, {}, rows), "| |");
    CHECK_EQ(text(cut.plan({rows})), "[8 block commit] [_ _ _ block scratch > 0 1 2]");
  }
  CHECK_EQ(text(decoder_of(seven, method).plan({6})), "[1 2 3 block commit] [4 5 6 block commit]");
}

TEST(blocks_bidirectional_prompt_is_never_cut) {
  SetBlockDecoder decoder = decoder_of(
      task({1, 2, 3, 4, 5}, 4),
      {.block_size = 2, .unmask = gamma(kInf), .prompt_attention = PromptAttention::bidirectional});
  CHECK_EQ(text(decoder.plan({2})), "[1 2 3 4 5 block commit] [_ _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {row(10), row(11)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 causal commit] [_ _ block scratch > 0 1]");
}

// --- Seeds ---

TEST(blocks_seed_needs_a_commit_of_its_own) {
  SetBlockDecoder decoder =
      decoder_of(task({1, 2}, 6), {.block_size = 4, .unmask = top_n(1), .seed_slot = true});
  CHECK_EQ(text(decoder.plan({})), "[1 2 causal commit > 1]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "[10 _ _ _ block scratch > 1 2 3]");
  CHECK_EQ(absorb(decoder, {row(11, 3), row(12, 1), row(13, 2)}), "2:12 | |");
  CHECK_EQ(text(decoder.plan({})), "[10 _ 12 _ block scratch > 1 3]");
  CHECK_EQ(absorb(decoder, {row(11, 1), row(13, 2)}), "1:11 | 11 12 |");
  CHECK_EQ(absorb(decoder, {row(13)}), "3:13 | 13 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 12 13 causal commit > 3]");
  CHECK_EQ(absorb(decoder, {row(14)}), "4:14 | 14 |");
  CHECK_EQ(text(decoder.plan({})), "[14 _ _ _ block scratch > 1]");
  CHECK_EQ(absorb(decoder, {row(15)}), "5:15 | 15 | length");
}

TEST(blocks_seed_ends_the_text) {
  const BlockMethod method{.block_size = 4, .unmask = gamma(0), .seed_slot = true};
  SetBlockDecoder stopped = decoder_of(task({1}, 9), method);
  CHECK_EQ(absorb(stopped, {row(kEos)}), "0:7 | 7 | stop");
  SetBlockDecoder last = decoder_of(task({1}, 1), method);
  CHECK_EQ(absorb(last, {row(10)}), "0:10 | 10 | length");
}

TEST(blocks_seeded_ones_of_one_are_next_token_prediction) {
  SetBlockDecoder decoder =
      decoder_of(task({1, 2}, 3), {.block_size = 1, .unmask = gamma(0), .seed_slot = true});
  CHECK_EQ(text(decoder.plan({1})), "[1 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 1), "| |");
  CHECK_EQ(text(decoder.plan({})), "[2 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "[10 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 |");
}

// The seed's row is the block's last one: at temperature > 0 it has been drawn there before.
TEST(blocks_seed_is_drawn_anew) {
  DecodeTask sampled = task({1}, 9);
  sampled.sampling = {.temperature = 1.0f, .seed = 5};
  SetBlockDecoder decoder =
      decoder_of(sampled, {.block_size = 3, .unmask = top_n(1), .seed_slot = true});
  CHECK_EQ(last_sampling(decoder).draw, 0);
  CHECK_EQ(absorb(decoder, {row(10)}), "0:110 | 110 |");
  CHECK_EQ(last_sampling(decoder).draw, 0);
  CHECK_EQ(absorb(decoder, {row(11), row(12)}), "1:111 | 111 |");
  CHECK_EQ(last_sampling(decoder).draw, 1);
  CHECK_EQ(absorb(decoder, {row(12)}), "2:112 | 112 |");
  CHECK_EQ(text(decoder.plan({})), "[110 111 112 causal commit > 2]");
  CHECK_EQ(last_sampling(decoder).draw, 2);
  CHECK_EQ(absorb(decoder, {row(13)}), "3:113 | 113 |");
  CHECK_EQ(last_sampling(decoder).draw, 0);
}

// Fast-dLLM v2's form: position i reads row i - 1, so the first one is never a mask.
TEST(blocks_shifted_ones_are_seeded_or_begin_in_the_prompt) {
  BlockMethod method = absolute(4, confidence(0.9f));
  method.logit_shift = 1;
  method.seed_slot = true;
  method.sub_block_size = 2;
  SetBlockDecoder decoder = decoder_of(task({1, 2, 3, 4}, 9), method);
  CHECK_EQ(text(decoder.plan({})), "[1 2 3 4 block commit > 3]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "[10 _ _ _ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(11, 0.2f)}), "1:11 | 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {likely(12, 0.2f), likely(13, 0.5f)}), "3:13 | |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 _ 13 block scratch > 1]");
  CHECK_EQ(absorb(decoder, {likely(12, 0.2f)}), "2:12 | 12 13 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 12 13 block commit > 3]");

  SetBlockDecoder inside = decoder_of(task({1, 2, 3, 4, 5}, 9), method);
  CHECK_EQ(text(inside.plan({})), "[1 2 3 4 block commit] [5 _ _ _ block scratch > 0]");
  CHECK_EQ(absorb(inside, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(inside.plan({})), "[5 10 _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(inside, {likely(11, 0.95f), likely(12, 0.95f)}), "1:11 2:12 | 11 12 |");
  CHECK_EQ(text(inside.plan({})), "[5 10 11 12 block commit > 3]");
}

// --- How many positions a forward decides ---

TEST(blocks_sub_blocks_are_decided_left_to_right) {
  SetBlockDecoder decoder =
      decoder_of(task({1}, 9), {.block_size = 5, .sub_block_size = 2, .unmask = top_n(2)});
  CHECK_EQ(text(decoder.plan({})), "[1 causal commit] [_ _ _ _ _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {row(10), row(11)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 _ _ _ block scratch > 2 3]");
  CHECK_EQ(absorb(decoder, {row(12), row(kEos)}), "2:12 3:7 | 12 7 | stop");
}

TEST(blocks_even_steps) {
  SetBlockDecoder decoder =
      decoder_of(task({1}, 9), {.block_size = 5, .steps = 2, .unmask = top_n(1)});
  CHECK_EQ(absorb(decoder, {row(10, 1), row(11, 5), row(12, 2), row(13, 4), row(14, 3)}),
           "0:10 2:12 4:14 | 10 |");  // the first step takes the rest of 5 / 2
  CHECK_EQ(absorb(decoder, {row(11), row(13)}), "1:11 3:13 | 11 12 13 14 |");

  // More steps than positions: one in each.
  SetBlockDecoder slow =
      decoder_of(task({1}, 9), {.block_size = 2, .steps = 7, .unmask = top_n(2)});
  CHECK_EQ(absorb(slow, {row(10, 2), row(11, 1)}), "1:11 | |");
  CHECK_EQ(absorb(slow, {row(10)}), "0:10 | 10 11 |");

  // Of a block with a token of the prompt the last step decides what is left.
  BlockMethod method = absolute(4, top_n(1));
  method.steps = 2;
  SetBlockDecoder inside = decoder_of(task({1}, 9), method);
  CHECK_EQ(absorb(inside, {row(10, 1), row(11, 2), row(12, 3)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(absorb(inside, {row(12)}), "2:12 | 12 |");
}

// SDAR: those above the threshold where they are as many as the step decides, else its number.
TEST(blocks_steps_are_the_least_number_of_confident_ones) {
  const BlockMethod method{.block_size = 4, .steps = 2, .unmask = confidence(0.8f)};
  SetBlockDecoder few = decoder_of(task({1}, 9), method);
  CHECK_EQ(absorb(few, {likely(10, 0.9f), likely(11, 0.1f), likely(12, 0.2f), likely(13, 0.3f)}),
           "0:10 3:13 | 10 |");
  SetBlockDecoder many = decoder_of(task({1}, 9), method);
  CHECK_EQ(absorb(many, {likely(10, 0.9f), likely(11, 0.85f), likely(12, 0.8f), likely(13, 0.95f)}),
           "0:10 1:11 3:13 | 10 11 |");
}

// Dream: a step from time t to s decides floor(m (1 - s / t)) of m, the last one all.
TEST(blocks_linear_steps) {
  BlockMethod method{.block_size = 4,
                     .steps = 2,
                     .schedule = Schedule::linear,
                     .unmask = {.rule = UnmaskRule::top_n, .proxy = Proxy::entropy}};
  SetBlockDecoder decoder = decoder_of(task({1}, 9), method);
  // t = 1, .5005, .001: floor(4 * .4995) = 1, then the rest.
  CHECK_EQ(absorb(decoder, {row(10, 4), row(11, 1), row(12, 2), row(13, 3)}), "1:11 | |");
  CHECK_EQ(absorb(decoder, {row(10), row(12), row(13)}), "0:10 2:12 3:13 | 10 11 12 13 |");

  // t falls by .124875 a step: 3 * .124875 / t is below 1 up to t = .3756, then 1.49. So the first
  // forward is the seventh step, the second one the last.
  method.block_size = 3;
  method.steps = 8;
  SetBlockDecoder slow = decoder_of(task({1}, 9), method);
  CHECK_EQ(absorb(slow, {row(10, 1), row(11, 2), row(12, 3)}), "0:10 | 10 |");
  CHECK_EQ(absorb(slow, {row(11, 2), row(12, 3)}), "1:11 2:12 | 11 12 |");
  CHECK_EQ(text(slow.plan({})), "[10 11 12 causal commit] [_ _ _ block scratch > 0 1 2]");
}

// --- No cache ---

BlockMethod uncached(std::optional<int> block_size, int logit_shift, const Unmask& unmask) {
  return {.block_size = block_size,
          .unmask = unmask,
          .logit_shift = logit_shift,
          .prompt_attention = PromptAttention::full,
          .commit_attention = CommitAttention::none};
}

FullContextDecoder uncached_decoder(const DecodeTask& task, BlockMethod method) {
  method.mask_token_id = kMask;
  return {task, method};
}

TEST(blocks_uncached_forwards_are_the_whole_text) {
  FullContextDecoder decoder = uncached_decoder(task({1, 2}, 5), uncached(2, 0, gamma(kInf)));
  CHECK_EQ(text(decoder.plan({})), "[1 2 _ _ _ _ _ block scratch > 2 3]");
  CHECK_EQ(absorb(decoder, {row(10), row(11)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[1 2 10 11 _ _ _ block scratch > 4 5]");
  CHECK_EQ(absorb(decoder, {row(12), row(13)}), "2:12 3:13 | 12 13 |");
  CHECK_EQ(text(decoder.plan({})), "[1 2 10 11 12 13 _ block scratch > 6]");
  CHECK_EQ(absorb(decoder, {row(14)}), "4:14 | 14 | length");
}

TEST(blocks_uncached_and_shifted) {
  FullContextDecoder decoder = uncached_decoder(task({1, 2}, 3), uncached(2, 1, gamma(kInf)));
  CHECK_EQ(text(decoder.plan({})), "[1 2 _ _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(10), row(11)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[1 2 10 11 _ block scratch > 3]");
  CHECK_EQ(absorb(decoder, {row(12)}), "2:12 | 12 | length");
}

TEST(blocks_uncached_in_one_block) {
  FullContextDecoder decoder =
      uncached_decoder(with_context(task({1, 2}, 50), 6), uncached({}, 0, top_n(3)));
  CHECK_EQ(text(decoder.plan({})), "[1 2 _ _ _ _ block scratch > 2 3 4 5]");
  CHECK_EQ(absorb(decoder, {row(10, 1), row(11, 2), row(12, 4), row(13, 3)}),
           "0:10 1:11 3:13 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[1 2 10 11 _ 13 block scratch > 4]");
  CHECK_EQ(absorb(decoder, {row(12)}), "2:12 | 12 13 | length");
}

// --- Ends ---

// Published loops go on behind an EOS until nothing before it is masked; set-block decoding cuts.
TEST(blocks_masks_behind_an_eos) {
  for (const bool past_eos : {true, false}) {
    for (const bool cached : {true, false}) {
      BlockMethod method =
          cached ? BlockMethod{.block_size = 4, .unmask = top_n(1)} : uncached(4, 0, top_n(1));
      method.past_eos = past_eos;
      SetBlockDecoder decoder = decoder_of(task({1}, 4), method);
      CHECK_EQ(absorb(decoder, {row(10, 2), row(11, 3), row(kEos, 1), row(13, 4)}), "2:7 | |");
      if (past_eos) {
        CHECK_EQ(absorb(decoder, {row(10, 2), row(11, 3), row(13, 1)}), "3:13 | |");
      }
      CHECK_EQ(absorb(decoder, {row(10, 2), row(11, 3)}), "0:10 | 10 |");
      CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 7 | stop");
    }
  }
}

TEST(blocks_past_an_eos_not_past_what_is_wanted) {
  SetBlockDecoder decoder =
      decoder_of(task({1}, 3), {.block_size = 4, .unmask = top_n(1), .past_eos = true});
  CHECK_EQ(text(decoder.plan({})), "[1 causal commit] [_ _ _ _ block scratch > 0 1 2]");
  CHECK_EQ(absorb(decoder, {row(10, 2), row(kEos, 1), row(12, 3)}), "1:7 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 7 _ _ block scratch > 0 2]");
  CHECK_EQ(absorb(decoder, {row(10, 1), row(12, 2)}), "0:10 | 10 7 | stop");
}

// --- What makes no method ---

TEST(blocks_settings_that_exclude_each_other) {
  const auto make = [](const BlockMethod& method) { return decoder_of(task({1}, 9), method); };
  CHECK_THROWS_WITH(make({.block_size = 0}), "expected `block_size` from 1 to the context of 100");
  CHECK_THROWS_WITH(make(uncached(0, 0, {})), "expected `block_size` from 1 to the context of 100");
  CHECK_THROWS_WITH(make({.block_size = 101}), "got 101");
  CHECK_THROWS_WITH(make({.block_size = {}}), "expected a `block_size` with a cache, got none");
  CHECK_THROWS_WITH(make({.sub_block_size = 0}), "expected sub_block_size >= 1, got 0");

  const char* none = "expected commit_attention none with prompt_attention full, and with no other";
  CHECK_THROWS_WITH(make({.commit_attention = CommitAttention::none}), none);
  CHECK_THROWS_WITH(make({.prompt_attention = PromptAttention::full}), none);

  const char* seed = "expected seed_slot with logit_shift 1 and a cache, and not without a cache";
  CHECK_THROWS_WITH(make({.logit_shift = 1}), seed);
  BlockMethod seeded = uncached(4, 0, {});
  seeded.seed_slot = true;
  CHECK_THROWS_WITH(make(seeded), seed);

  BlockMethod cut = absolute(4, {});
  cut.prompt_attention = PromptAttention::bidirectional;
  CHECK_THROWS_WITH(make(cut), "causal or block_causal with absolute blocks");
  cut.prompt_attention = PromptAttention::full;
  cut.commit_attention = CommitAttention::none;
  CHECK_THROWS_WITH(make(cut), "causal or block_causal with absolute blocks");
}

}  // namespace
}  // namespace sbd
