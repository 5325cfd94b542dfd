// Lossless Set Block Decoding and linear self-speculation: hand-worked cases.
#include "decode/lossless.h"

#include "decode/registry.h"
#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

LosslessDecoder fused(const DecodeTask& task, int block_size, const Unmask& unmask = gamma(kInf)) {
  return {task, {.mask_token_id = kMask, .block_size = block_size, .unmask = unmask}};
}

TEST(lossless_keeps_a_draft_as_far_as_its_own_rows_predict_it) {
  LosslessDecoder decoder = fused(task({1, 2}, 9), 3);
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 causal commit > 1] [_ _ _ block scratch > 1 2]");
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 causal commit > 1] [_ _ _ block scratch > 1 2]");
  // The prompt's last row predicts the first token: it is text at once, the others are a draft.
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");

  const char* verifying = "at 2 [10 11 12 causal commit > 0 1 2] [_ _ _ block scratch > 1 2]";
  CHECK_EQ(text(decoder.plan({})), verifying);
  CHECK_EQ(absorb(decoder, {row(11), row(12), row(13), row(14), row(15)}),
           "3:13 4:14 5:15 | 11 12 13 | accepted 3");

  CHECK_EQ(text(decoder.plan({})),
           "at 5 [13 14 15 causal commit > 0 1 2] [_ _ _ block scratch > 1 2]");
  // 14 agrees, 15 does not: 20 stands there, and what the masks behind it decided is dropped.
  CHECK_EQ(absorb(decoder, {row(14), row(20), row(21), row(22), row(23)}),
           "5:20 | 14 20 | accepted 2");

  CHECK_EQ(text(decoder.plan({})), "at 7 [20 causal commit > 0] [_ _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(21), row(22), row(23)}), "6:21 7:22 8:23 | 21 |");

  // The text would end with it: verified alone, and nothing asks what its last row predicts.
  CHECK_EQ(text(decoder.plan({})), "at 8 [21 22 causal commit > 0 1]");
  CHECK_EQ(absorb(decoder, {row(22), row(23)}), "| 22 23 | length accepted 3");
}

TEST(lossless_draft_that_is_wrong_at_once) {
  LosslessDecoder decoder = fused(task({1}, 4), 4);
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12), row(13)}), "0:10 1:11 2:12 3:13 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "at 1 [10 11 12 causal commit > 0 1 2]");
  CHECK_EQ(absorb(decoder, {row(20), row(12), row(13)}), "1:20 | 20 | accepted 1");
  CHECK_EQ(text(decoder.plan({})), "at 2 [20 causal commit > 0] [_ _ _ _ block scratch > 1]");
  CHECK_EQ(absorb(decoder, {row(21), row(22)}), "2:21 3:22 | 21 |");
  CHECK_EQ(text(decoder.plan({})), "at 3 [21 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(30)}), "3:30 | 30 | length accepted 1");
}

TEST(lossless_denoises_a_block_by_any_rule) {
  LosslessDecoder decoder = fused(task({1, 2}, 9), 3, gamma(0));
  CHECK_EQ(absorb(decoder, {row(10), row(11, 0.5f), row(12, 0.1f)}), "0:10 2:12 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 _ 12 block scratch > 1]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | |");
  CHECK_EQ(text(decoder.plan({})),
           "at 2 [10 11 12 causal commit > 0 1 2] [_ _ _ block scratch > 1 2]");
}

TEST(lossless_prefills_in_chunks_and_verifies_in_one_piece) {
  DecodeTask long_prompt = task({1, 2, 3, 4, 5}, 9);
  LosslessDecoder decoder = fused(long_prompt, 3);
  CHECK_EQ(text(decoder.plan({2})), "at 0 [1 2 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| |");
  CHECK_EQ(text(decoder.plan({2})), "at 2 [3 4 causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| |");
  CHECK_EQ(text(decoder.plan({2})), "at 4 [5 causal commit > 0] [_ _ _ block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");
  CHECK_EQ(text(decoder.plan({2})),
           "at 5 [10 11 12 causal commit > 0 1 2] [_ _ _ block scratch > 1 2]");
}

TEST(lossless_ends_with_its_first_token) {
  LosslessDecoder stopped = fused(task({1}, 9), 3);
  CHECK_EQ(absorb(stopped, {row(kEos), row(11), row(12)}), "0:7 | 7 | stop");
  LosslessDecoder last = fused(task({1}, 1), 3);
  CHECK_EQ(text(last.plan({})), "at 0 [1 causal commit > 0]");  // no mask would be text
  CHECK_EQ(absorb(last, {row(10)}), "0:10 | 10 | length");
}

TEST(lossless_eos_in_a_draft_counts_once_it_is_verified) {
  const auto drafted = [] {
    LosslessDecoder decoder = fused(task({1}, 9), 3);
    CHECK_EQ(absorb(decoder, {row(10), row(kEos), row(12)}), "0:10 1:7 2:12 | 10 |");
    CHECK_EQ(text(decoder.plan({})), "at 1 [10 causal commit > 0]");
    return decoder;
  };
  LosslessDecoder agreed = drafted();
  CHECK_EQ(absorb(agreed, {row(kEos)}), "| 7 | stop accepted 2");

  LosslessDecoder refused = drafted();
  CHECK_EQ(absorb(refused, {row(11)}), "1:11 | 11 | accepted 1");
  CHECK_EQ(text(refused.plan({})), "at 2 [11 causal commit > 0] [_ _ _ block scratch > 1 2]");
}

TEST(lossless_eos_that_the_rows_predict) {
  LosslessDecoder correction = fused(task({1}, 9), 3);
  CHECK_EQ(absorb(correction, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");
  CHECK_EQ(absorb(correction, {row(11), row(kEos), row(13), row(14), row(15)}),
           "2:7 | 11 7 | stop accepted 2");
  LosslessDecoder behind = fused(task({1}, 9), 3);
  CHECK_EQ(absorb(behind, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");
  CHECK_EQ(absorb(behind, {row(11), row(12), row(kEos), row(14), row(15)}),
           "3:7 | 11 12 7 | stop accepted 3");
}

TEST(lossless_blocks_of_one_are_next_token_prediction) {
  LosslessDecoder decoder = fused(task({1, 2}, 3), 1);
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 causal commit > 1]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 | accepted 1");
  CHECK_EQ(text(decoder.plan({})), "at 3 [11 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(12)}), "2:12 | 12 | length accepted 1");
}

TEST(lossless_ends_with_the_context) {
  DecodeTask full = task({1, 2}, 50);
  full.n_ctx = 7;
  LosslessDecoder decoder = fused(full, 3);
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 11 12 causal commit > 0 1 2] [_ _ block scratch > 1]");
  CHECK_EQ(absorb(decoder, {row(11), row(12), row(13), row(14)}),
           "3:13 4:14 | 11 12 13 | accepted 3");
  CHECK_EQ(text(decoder.plan({})), "at 5 [13 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(14)}), "| 14 | length accepted 2");

  full.n_ctx = 6;  // the next block's first token is the last, and no guess
  LosslessDecoder shorter = fused(full, 3);
  CHECK_EQ(absorb(shorter, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");
  CHECK_EQ(text(shorter.plan({})), "at 2 [10 11 12 causal commit > 0 1 2]");
  CHECK_EQ(absorb(shorter, {row(11), row(12), row(13)}), "3:13 | 11 12 13 | length accepted 3");
}

// --- Blocks behind every token of a draft ---

TEST(lossless_drafts_behind_every_outcome) {
  LosslessDecoder decoder(task({1, 2}, 20), {.mask_token_id = kMask,
                                             .block_size = 3,
                                             .unmask = gamma(kInf),
                                             .adapted = true,
                                             .begins = Begins::every});
  CHECK_EQ(text(decoder.plan({})),
           "at 0 [1 2 causal commit > 1] [_ _ _ adapted block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:10 1:11 2:12 | 10 |");
  const auto behind_each = [](int at, const char* draft) {
    const auto masks = [](const std::string& begin) {
      return " [" + begin + "_ _ _ adapted block scratch > 1 2]";
    };
    const auto begin = [&](int i) { return "at " + std::to_string(at + i) + " "; };
    return begin(0) + "[" + draft + " causal commit > 0 1 2]" + masks("") + masks(begin(2)) +
           masks(begin(1));
  };
  CHECK_EQ(text(decoder.plan({})), behind_each(2, "10 11 12"));
  // 11 agrees and 12 does not: the block behind two tokens is the next draft, 20 its first.
  CHECK_EQ(absorb(decoder, {row(11), row(20), row(30), row(40), row(41), row(21), row(22), row(50),
                            row(51)}),
           "2:20 3:21 4:22 | 11 20 | accepted 2");
  CHECK_EQ(text(decoder.plan({})), behind_each(4, "20 21 22"));
  CHECK_EQ(absorb(decoder, {row(31), row(22), row(23), row(40), row(41), row(42), row(43), row(32),
                            row(33)}),
           "3:31 4:32 5:33 | 31 | accepted 1");
  CHECK_EQ(text(decoder.plan({})), behind_each(5, "31 32 33"));
  CHECK_EQ(absorb(decoder, {row(32), row(33), row(34), row(35), row(36), row(42), row(43), row(44),
                            row(45)}),
           "6:34 7:35 8:36 | 32 33 34 | accepted 3");
  CHECK_EQ(text(decoder.plan({})), behind_each(8, "34 35 36"));
}

TEST(lossless_rules_of_every_outcome_know_what_stands_before_it) {
  DecodeTask penalised = task({1, 2}, 20);
  penalised.rules.presence_penalty = 1.0f;
  LosslessDecoder decoder(
      penalised,
      {.mask_token_id = kMask, .block_size = 3, .unmask = gamma(kInf), .begins = Begins::every});
  absorb(decoder, {row(10), row(11), row(12)});
  const Plan plan = decoder.plan({});
  const std::vector<Tokens> before = {{10, 11, 12}, {10, 11}, {10}};
  for (std::size_t i = 0; i < before.size(); ++i) {
    Tokens penalised_ones;
    for (const Adjustment& one : plan.segments.at(1 + i).asks.at(0).rules->adjustments) {
      penalised_ones.push_back(one.token);
    }
    CHECK_EQ(penalised_ones, before[i]);
  }
}

TEST(lossless_drafts_behind_the_whole_draft_alone_where_there_is_no_room) {
  DecodeTask full = task({1, 2}, 50);
  full.n_ctx = 13;
  LosslessDecoder decoder(
      full,
      {.mask_token_id = kMask, .block_size = 3, .unmask = gamma(kInf), .begins = Begins::every});
  absorb(decoder, {row(10), row(11), row(12)});
  const char* behind_all = "at 2 [10 11 12 causal commit > 0 1 2] [_ _ _ block scratch > 1 2]";
  CHECK_EQ(text(decoder.plan({})), behind_all);
  full.n_ctx = 100;
  full.max_tokens = 9;  // the cache's room is for as many
  LosslessDecoder shorter(
      full,
      {.mask_token_id = kMask, .block_size = 3, .unmask = gamma(kInf), .begins = Begins::every});
  absorb(shorter, {row(10), row(11), row(12)});
  CHECK_EQ(text(shorter.plan({})), behind_all);
}

// --- Separate: draft, verify, draft ---

TEST(lossless_separate_forwards_draft_with_the_adapter) {
  LosslessDecoder decoder(task({1, 2}, 7), {.mask_token_id = kMask,
                                            .block_size = 3,
                                            .unmask = top_n(3),
                                            .fused = false,
                                            .adapted = true});
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 causal commit > 1]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 _ _ adapted block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(11), row(12)}), "1:11 2:12 | |");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 11 12 causal commit > 0 1 2]");
  CHECK_EQ(absorb(decoder, {row(11), row(20), row(30)}), "2:20 | 11 20 | accepted 2");
  CHECK_EQ(text(decoder.plan({})), "at 4 [20 _ _ adapted block scratch > 1 2]");
  CHECK_EQ(absorb(decoder, {row(21), row(22)}), "3:21 4:22 | |");
  CHECK_EQ(text(decoder.plan({})), "at 4 [20 21 22 causal commit > 0 1 2]");
  CHECK_EQ(absorb(decoder, {row(21), row(22), row(23)}), "5:23 | 21 22 23 | accepted 3");
  CHECK_EQ(text(decoder.plan({})), "at 7 [23 _ _ adapted block scratch > 1]");
  CHECK_EQ(absorb(decoder, {row(24)}), "6:24 | |");
  CHECK_EQ(text(decoder.plan({})), "at 7 [23 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(25)}), "6:25 | 25 | length accepted 1");
}

TEST(lossless_separate_blocks_of_one) {
  LosslessDecoder decoder(
      task({1}, 3), {.mask_token_id = kMask, .block_size = 1, .unmask = top_n(1), .fused = false});
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 |");
  CHECK_EQ(text(decoder.plan({})), "at 1 [10 causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 | accepted 1");
  CHECK_EQ(text(decoder.plan({})), "at 2 [11 causal commit > 0]");
}

// --- Above temperature 0 ---

TEST(lossless_keeps_sampled_tokens_that_the_rows_draw_too) {
  DecodeTask sampled = task({1, 2}, 9);
  sampled.sampling = {.temperature = 0.5f, .top_k = 4, .seed = 8};
  LosslessDecoder decoder = fused(sampled, 3);
  CHECK_EQ(absorb(decoder, {row(10), row(11), row(12)}), "0:110 1:111 2:112 | 110 |");
  const Plan plan = decoder.plan({});
  CHECK_EQ(text(plan), "at 2 [110 111 112 causal commit > 0 1 2] [_ _ _ block scratch > 1 2]");
  for (const Segment& segment : plan.segments) {  // alike, but for where the tokens stand
    CHECK_EQ(segment.sampling.temperature, 0.5f);
    CHECK_EQ(segment.sampling.top_k, 4);
    CHECK_EQ(segment.sampling.seed, 8u);
    CHECK_EQ(segment.sampling.draw, 0u);
    CHECK_EQ(segment.decides, segment.kv == Kv::commit ? 1 : 0);
  }
  CHECK_EQ(absorb(decoder, {row(11), row(20), row(13), row(14), row(15)}),
           "2:120 | 111 120 | accepted 2");
}

// --- What is refused ---

TEST(lossless_refusals) {
  CHECK_THROWS_WITH(fused(task({1}, 9), 0), "expected `block_size` from 1 to the context of 100");
  CHECK_THROWS_WITH(fused(task({1}, 9), 101), "got 101");
  LosslessDecoder decoder = fused(task({1}, 9), 3);
  CHECK_THROWS_WITH(absorb(decoder, {}), "expected statistics of 3 rows, got 0");
}

TEST(lossless_decoders_by_name) {
  DecoderOptions options;
  options.block = {.mask_token_id = kMask, .block_size = 4, .unmask = gamma(0)};
  options.has_mask_token = true;
  options.has_adapter = true;
  CHECK_EQ(text(make_decoder("sbd_lossless", task({1}, 9), options)->plan({})),
           "at 0 [1 causal commit > 0] [_ _ _ _ adapted block scratch > 1 2 3]");
  options.has_adapter = false;
  const auto ours = make_decoder("sbd_lossless", task({1}, 9), options);
  CHECK_EQ(text(ours->plan({})), "at 0 [1 causal commit > 0] [_ _ _ _ block scratch > 1 2 3]");
  CHECK_EQ(absorb(*ours, {row(10), row(11, 1), row(12, 2), row(13, 3)}), "0:10 1:11 | 10 |");

  for (const bool adapter : {true, false}) {  // whatever the rule, a draft is one forward
    options.has_adapter = adapter;
    const auto theirs = make_decoder("nemotron_spec", task({1}, 9), options);
    CHECK_EQ(absorb(*theirs, {row(10)}), "0:10 | 10 |");
    CHECK_EQ(text(theirs->plan({})), std::string("at 1 [10 _ _ _ ") + (adapter ? "adapted " : "") +
                                         "block scratch > 1 2 3]");
    CHECK_EQ(absorb(*theirs, {row(11, 1), row(12, 2), row(13, 3)}), "1:11 2:12 3:13 | |");
  }

  for (const char* name : {"sbd_lossless", "nemotron_spec"}) {
    const auto refused = [&](auto change) {
      DecoderOptions other = options;
      change(other.block);
      CHECK_THROWS_WITH(make_decoder(name, task({1}, 9), other), "verifies by causal rows");
    };
    refused([](BlockMethod& m) { m.prompt_attention = PromptAttention::bidirectional; });
    refused([](BlockMethod& m) { m.commit_attention = CommitAttention::block; });
    refused([](BlockMethod& m) { m.logit_shift = 1; });
    DecoderOptions no_mask = options;
    no_mask.has_mask_token = false;
    CHECK_THROWS_WITH(make_decoder(name, task({1}, 9), no_mask), "needs a mask token");
    no_mask.has_adapter = no_mask.has_mask_embedding = true;
    no_mask.block.mask_token_id = kMaskSlot;
    make_decoder(name, task({1}, 9), no_mask);
  }
}

}  // namespace
}  // namespace sbd
