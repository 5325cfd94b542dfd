// Discrete Diffusion Forcing: hand-worked cases.
#include "decode/d2f.h"

#include <algorithm>
#include <cmath>

#include "decode/registry.h"
#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

// What the tests do not set: a block more in every step, the next one activated when the one before
// is decided, sure tokens above 0.9.
D2fDecoder decoder_of(const DecodeTask& task, int block_size,
                      D2fMethod method = {
                          .block_add_threshold = 0,
                          .decoded_token_threshold = 1,
                      }) {
  method.mask_token_id = kMask;
  method.block_size = block_size;
  return {task, method};
}

TEST(d2f_adds_activates_and_caches_blocks) {
  D2fDecoder decoder =
      decoder_of(task({1, 2}, 6), 2, {.block_add_threshold = 0.5f, .decoded_token_threshold = 1});
  const char* first = "[1 2 block commit] [_ _ block scratch > 0 1]";
  CHECK_EQ(text(decoder.plan({})), first);
  CHECK_EQ(text(decoder.plan({})), first);
  // None is sure, so the activated block decides its best; with half of it the next one is added.
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(11, 0.6f)}), "1:11 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 11 block scratch > 0] [_ _ block scratch > 0 1]");
  // The second block is not activated: of its positions only the sure one is decided.
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(12, 0.95f), likely(13, 0.2f)}),
           "0:10 2:12 | 10 11 12 |");
  CHECK_EQ(text(decoder.plan({})),
           "[10 11 block commit] [12 _ block scratch > 1] [_ _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {likely(13, 0.5f), likely(14, 0.95f), likely(15, 0.95f)}),
           "3:13 4:14 5:15 | 13 14 15 | length");
}

TEST(d2f_adds_nothing_below_the_threshold) {
  D2fDecoder decoder = decoder_of(task({1}, 9), 3, {.block_add_threshold = 0.5f});
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(11, 0.6f), likely(12, 0.4f)}), "1:11 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 11 _ block scratch > 0 2]");  // a third is decided
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(12, 0.4f)}), "0:10 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 _ block scratch > 2] [_ _ _ block scratch > 0 1 2]");
}

// A block that is decided before an earlier one stays in the forward, and is cached with it.
TEST(d2f_decided_blocks_wait_for_earlier_ones) {
  D2fDecoder decoder = decoder_of(task({1}, 9), 3);
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(11, 0.6f), likely(12, 0.5f)}), "1:11 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 11 _ block scratch > 0 2] [_ _ _ block scratch > 0 1 2]");
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(12, 0.6f), likely(20, 0.95f),
                            likely(21, 0.95f), likely(22, 0.95f)}),
           "2:12 3:20 4:21 5:22 | |");
  CHECK_EQ(text(decoder.plan({})),
           "[_ 11 12 block scratch > 0] [20 21 22 block scratch] [_ _ _ block scratch > 0 1 2]");
  // The third block is activated by the second, decided though not cached.
  CHECK_EQ(
      absorb(decoder, {likely(10, 0.5f), likely(30, 0.1f), likely(31, 0.2f), likely(32, 0.3f)}),
      "0:10 8:32 | 10 11 12 20 21 22 |");
  CHECK_EQ(text(decoder.plan({})),
           "[10 11 12 block commit] [20 21 22 block commit] [_ _ 32 block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {likely(30, 0.95f), likely(31, 0.95f)}),
           "6:30 7:31 | 30 31 32 | length");
}

TEST(d2f_activation_is_for_good_and_by_share) {
  D2fDecoder decoder =
      decoder_of(task({1}, 4), 2, {.block_add_threshold = 0, .decoded_token_threshold = 0.5f});
  CHECK_EQ(absorb(decoder, {likely(10, 0.1f), likely(11, 0.2f)}), "1:11 | |");
  // Half of the first block is decided: the second one takes its best too, in the same forward.
  CHECK_EQ(absorb(decoder, {likely(10, 0.1f), likely(12, 0.3f), likely(13, 0.2f)}),
           "0:10 2:12 | 10 11 12 |");
}

// --- Thresholds ---

TEST(d2f_sure_is_strictly_above_the_threshold) {
  const D2fMethod method{.block_add_threshold = 1, .skip_threshold = 0.5f};
  D2fDecoder equal = decoder_of(task({1}, 9), 3, method);
  CHECK_EQ(absorb(equal, {likely(10, 0.5f), likely(11, 0.5f), likely(12, 0.5f)}),
           "0:10 | 10 |");  // none: the best, of equal ones the first
  D2fDecoder above = decoder_of(task({1}, 9), 3, method);
  CHECK_EQ(absorb(above, {likely(10, 0.5f), likely(11, 0.75f), likely(12, 0.625f)}),
           "1:11 2:12 | |");
  D2fDecoder nan = decoder_of(task({1}, 9), 2, method);  // still at least one
  CHECK_EQ(absorb(nan, {likely(10, std::nanf("")), likely(11, std::nanf(""))}), "0:10 | 10 |");
}

TEST(d2f_shares_of_a_block_are_exact) {
  // 7 / 10 >= 0.7 whatever 1 - 3 / 10 rounds to.
  for (int size = 2; size <= 20; ++size) {
    for (int decided = 1; decided < size; ++decided) {
      for (int percent = 0; percent <= 100; ++percent) {
        D2fDecoder decoder = decoder_of(task({1}, 90), size,
                                        {.block_add_threshold = static_cast<float>(percent) / 100});
        std::vector<RowStats> stats(static_cast<std::size_t>(size), likely(10, 0.1f));
        std::fill_n(stats.begin(), decided, likely(10, 0.95f));
        decoder.absorb(decoder.plan({}), stats);
        const bool added = decoder.plan({}).segments.size() == 2;
        CHECK_EQ(added, 100 * decided >= percent * size);
      }
    }
  }
}

TEST(d2f_draws_and_weighs_what_is_drawn) {
  DecodeTask sampled = task({1}, 4);
  sampled.sampling = {.temperature = 1.0f, .seed = 3};
  D2fDecoder decoder = decoder_of(sampled, 2);
  CHECK_EQ(last_sampling(decoder).seed, 3);
  CHECK_EQ(last_sampling(decoder).draw, 0);
  RowStats sure = likely(10, 0.1f), unsure = likely(11, 0.95f);
  sure.sampled_probability = 0.95f;
  unsure.sampled_probability = 0.1f;
  CHECK_EQ(absorb(decoder, {sure, unsure}), "0:110 | 110 |");
  const Plan plan = decoder.plan({});
  CHECK_EQ(plan.segments[0].sampling.draw, 1);
  CHECK_EQ(plan.segments[1].sampling.draw, 0);  // each block counts its own forwards
}

// --- Shifted logits ---

// Dream: the row before a position predicts it, be it a mask of the block before.
TEST(d2f_shifted_rows) {
  const D2fMethod method{.logit_shift = 1, .block_add_threshold = 0, .decoded_token_threshold = 1};
  D2fDecoder decoder = decoder_of(task({1, 2}, 4), 2, method);
  CHECK_EQ(text(decoder.plan({})), "[1 2 block commit > 1] [_ _ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(10, 0.5f), likely(11, 0.95f)}), "1:11 | |");
  // The first position needs no row: the prompt's last one is kept. The second block's first
  // position reads the first one's last row.
  CHECK_EQ(text(decoder.plan({})), "[_ 11 block scratch > 1] [_ _ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(20, 0.95f), likely(21, 0.1f)}), "0:10 2:20 | 10 11 20 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 block commit > 1] [20 _ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(30, 0.1f), likely(31, 0.5f)}), "3:31 | 31 | length");
}

TEST(d2f_shifted_and_the_newest_cached_row) {
  const D2fMethod method{.logit_shift = 1, .block_add_threshold = 0, .decoded_token_threshold = 1};
  D2fDecoder decoder = decoder_of(task({1, 2}, 4), 2, method);
  CHECK_EQ(absorb(decoder, {likely(10, 0.95f), likely(11, 0.95f)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 block commit > 1] [_ _ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(20, 0.6f), likely(21, 0.7f)}), "3:21 | |");
  // All that is missing is what the cached row said: a forward that wants no rows.
  CHECK_EQ(text(decoder.plan({})), "[_ 21 block scratch]");
  CHECK_EQ(absorb(decoder, {}), "2:20 | 20 21 | length");
}

// --- Ends ---

TEST(d2f_eos_stops_the_adding) {
  D2fDecoder decoder = decoder_of(task({1}, 9), 3);
  CHECK_EQ(absorb(decoder, {likely(10, 0.1f), likely(kEos, 0.95f), likely(12, 0.2f)}), "1:7 | |");
  // A mask behind it is decided as any other.
  CHECK_EQ(text(decoder.plan({})), "[_ 7 _ block scratch > 0 2]");
  CHECK_EQ(absorb(decoder, {likely(10, 0.1f), likely(12, 0.2f)}), "2:12 | |");
  CHECK_EQ(text(decoder.plan({})), "[_ 7 12 block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(10, 0.1f)}), "0:10 | 10 7 | stop");

  D2fDecoder first = decoder_of(task({1}, 9), 3);
  CHECK_EQ(absorb(first, {likely(kEos, 0.95f), likely(11, 0.1f), likely(12, 0.1f)}),
           "0:7 | 7 | stop");

  DecodeTask ignoring = task({1}, 9);
  ignoring.eos_token_ids = {};
  D2fDecoder on = decoder_of(ignoring, 2);
  CHECK_EQ(absorb(on, {likely(kEos, 0.95f), likely(11, 0.95f)}), "0:7 1:11 | 7 11 |");
}

TEST(d2f_eos_in_a_later_block_waits_for_what_is_before_it) {
  D2fDecoder decoder = decoder_of(task({1}, 9), 2);
  CHECK_EQ(absorb(decoder, {likely(10, 0.1f), likely(11, 0.2f)}), "1:11 | |");
  CHECK_EQ(absorb(decoder, {likely(10, 0.95f), likely(12, 0.1f), likely(kEos, 0.95f)}),
           "0:10 3:7 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 block commit] [_ 7 block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(12, 0.1f)}), "2:12 | 12 7 | stop");
}

// Whole blocks, of which the tokens wanted are the first ones.
TEST(d2f_ends_with_the_tokens_wanted) {
  D2fDecoder decoder = decoder_of(task({1}, 3), 2);
  CHECK_EQ(absorb(decoder, {likely(10, 0.95f), likely(11, 0.95f)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 block commit] [_ _ block scratch > 0 1]");
  CHECK_EQ(absorb(decoder, {likely(12, 0.1f), likely(kEos, 0.2f)}), "3:7 | |");
  CHECK_EQ(absorb(decoder, {likely(12, 0.1f)}), "2:12 | 12 | length");

  D2fDecoder early = decoder_of(task({1}, 1), 2);  // with masks left
  CHECK_EQ(absorb(early, {likely(10, 0.95f), likely(11, 0.1f)}), "0:10 | 10 | length");
}

TEST(d2f_last_block_is_cut_where_the_context_ends) {
  DecodeTask full = task({1, 2}, 50);
  full.n_ctx = 5;
  D2fDecoder decoder = decoder_of(full, 2);
  CHECK_EQ(absorb(decoder, {likely(10, 0.95f), likely(11, 0.95f)}), "0:10 1:11 | 10 11 |");
  CHECK_EQ(text(decoder.plan({})), "[10 11 block commit] [_ block scratch > 0]");
  CHECK_EQ(absorb(decoder, {likely(12, 0.1f)}), "2:12 | 12 | length");
}

TEST(d2f_takes_what_it_shares_from_the_block) {
  DecoderOptions options;
  options.has_mask_token = true;
  options.block.mask_token_id = kMask;
  options.block.block_size = 2;
  options.block.logit_shift = 1;
  CHECK_EQ(text(make_decoder("d2f", task({1}, 9), options)->plan({})),
           "[1 block commit > 0] [_ _ block scratch > 0]");
}

// --- What is refused ---

TEST(d2f_refusals) {
  const DecodeTask good = task({1}, 9);
  CHECK_THROWS_WITH(decoder_of(good, 0), "expected `block_size` from 1 to the context of 100");
  CHECK_THROWS_WITH(decoder_of(good, 101), "got 101");
  D2fDecoder unwanted = decoder_of(good, 2);
  CHECK_THROWS_WITH(absorb(unwanted, {}), "expected statistics of 2 rows, got 0");
  CHECK_THROWS_WITH(make_decoder("d2f", good, {}), "decoder \"d2f\" needs a mask token");
}

}  // namespace
}  // namespace sbd
