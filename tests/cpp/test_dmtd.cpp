// Direct Multi-Token Decoding: hand-worked cases, and what holds of any plan.
#include "decode/dmtd.h"

#include <algorithm>

#include "core/random.h"
#include "decode/registry.h"
#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

DmtdDecoder decoder_of(const DecodeTask& task, int horizon, DmtdPromptRule rule) {
  return {task, {.horizon = horizon, .prompt_rule = rule}};
}

TEST(dmtd_thinks_at_heads_and_refills_in_front_of_them) {
  DmtdDecoder decoder = decoder_of(task({1, 2, 3}, 9), 3, DmtdPromptRule::all_heads);
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 3 e+h causal commit > 2]");
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 3 e+h causal commit > 2]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 3 [10 e+h causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 4 [11 skip e causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(12)}), "2:12 | 12 |");
  CHECK_EQ(text(decoder.plan({})), "at 5 [12 skip e causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(13)}), "3:13 | 13 |");
  CHECK_EQ(text(decoder.plan({})), "at 4 [11 12 refill causal commit] [13 e+h causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(14)}), "4:14 | 14 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 7 [14 skip e causal commit > 0]");
}

TEST(dmtd_horizon_one_thinks_always) {
  DmtdDecoder decoder = decoder_of(task({1, 2}, 9), 1, DmtdPromptRule::all_heads);
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 e+h causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 3 [11 e+h causal commit > 0]");
}

TEST(dmtd_plain_prompt) {
  DmtdDecoder decoder = decoder_of(task({1, 2}, 9), 2, DmtdPromptRule::plain);
  CHECK_EQ(text(decoder.plan({})), "at 0 [1 2 causal commit > 1]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 2 [10 e+h causal commit > 0]");  // a head, as ever
}

// Heads are at absolute multiples, so the prompt has some and the first token need not be one.
TEST(dmtd_train_counts_from_the_first_position) {
  DmtdDecoder decoder = decoder_of(task({1, 2, 3, 4, 5}, 9), 3, DmtdPromptRule::train);
  CHECK_EQ(text(decoder.plan({})),
           "at 0 [1 e+h causal commit] [2 3 e causal commit] [4 e+h causal commit] [5 e causal "
           "commit > 0]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 5 [10 skip e causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(11)}), "1:11 | 11 |");
  CHECK_EQ(text(decoder.plan({})), "at 5 [10 refill causal commit] [11 e+h causal commit > 0]");

  // At horizon 1 every row is a head and one segment.
  CHECK_EQ(text(decoder_of(task({1, 2}, 9), 1, DmtdPromptRule::train).plan({})),
           "at 0 [1 2 e+h causal commit > 1]");
}

TEST(dmtd_prefills_in_chunks) {
  DecodeTask long_prompt = task({1, 2, 3, 4, 5}, 9);
  DmtdDecoder decoder = decoder_of(long_prompt, 3, DmtdPromptRule::train);
  CHECK_EQ(text(decoder.plan({2})), "at 0 [1 e+h causal commit] [2 e causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| | thinking");
  CHECK_EQ(text(decoder.plan({2})), "at 2 [3 e causal commit] [4 e+h causal commit]");
  CHECK_EQ(absorb(decoder, {}, 2), "| | thinking");
  CHECK_EQ(text(decoder.plan({2})), "at 4 [5 e causal commit > 0]");
  CHECK_EQ(absorb(decoder, {row(10)}), "0:10 | 10 | thinking");
}

TEST(dmtd_ends_as_next_token_prediction_does) {
  DmtdDecoder stopped = decoder_of(task({1}, 5), 2, DmtdPromptRule::plain);
  CHECK_EQ(absorb(stopped, {row(10)}), "0:10 | 10 | thinking");
  CHECK_EQ(absorb(stopped, {row(kEos)}), "1:7 | 7 | stop thinking");

  DecodeTask full = task({1, 2, 3}, 50);
  full.n_ctx = 5;
  DmtdDecoder context = decoder_of(full, 2, DmtdPromptRule::plain);
  CHECK_EQ(absorb(context, {row(10)}), "0:10 | 10 | thinking");
  CHECK_EQ(absorb(context, {row(11)}), "1:11 | 11 | length thinking");

  DecodeTask sampled = task({1}, 1);
  sampled.sampling = {.temperature = 0.5f, .seed = 3};
  DmtdDecoder drawn = decoder_of(sampled, 2, DmtdPromptRule::plain);
  CHECK_EQ(last_sampling(drawn).seed, 3);
  CHECK_EQ(absorb(drawn, {row(10)}), "0:110 | 110 | length thinking");
}

TEST(dmtd_refusals) {
  DmtdDecoder decoder = decoder_of(task({1}, 9), 2, DmtdPromptRule::plain);
  CHECK_THROWS_WITH(absorb(decoder, {}), "expected statistics of 1 rows, got 0");
  CHECK_THROWS_WITH(make_decoder("dmtd", task({1}, 9), {}),
                    "needs a cut of the layers and the model file has none");
  DecoderOptions cut;
  cut.has_layer_cut = true;
  cut.dmtd = {.horizon = 2, .prompt_rule = DmtdPromptRule::plain};
  CHECK_EQ(text(make_decoder("dmtd", task({1}, 9), cut)->plan({})), "at 0 [1 causal commit > 0]");
}

// What the cache of a run of layers has, as a forward leaves it.
struct Run {
  Tokens tokens;
  std::vector<float> h_factors;  // each row's share of h

  void put(std::size_t at, const Segment& segment) {
    CHECK(at <= tokens.size());  // no gap
    tokens.resize(at);
    h_factors.resize(at);
    tokens.insert(tokens.end(), segment.tokens.begin(), segment.tokens.end());
    h_factors.resize(tokens.size(), segment.h_factor);
  }
};

TEST(dmtd_runs_never_have_gaps_on_random_tasks) {
  std::uint64_t drawn = 0;
  const auto below = [&](int bound) {
    return static_cast<int>(mix64(0x51u + ++drawn) % static_cast<std::uint64_t>(bound));
  };
  for (int round = 0; round < 500; ++round) {
    DecodeTask random = task(Tokens(static_cast<std::size_t>(1 + below(12)), 3), 1 + below(30));
    const Budget budget{1 + below(8)};
    const int horizon = 1 + below(6);
    const auto rule = static_cast<DmtdPromptRule>(below(3));
    DmtdDecoder decoder = decoder_of(random, horizon, rule);
    const int prompt = static_cast<int>(random.prompt.size());

    Tokens all = random.prompt;
    Run encoded, thinking, decoded;
    for (bool finished = false; !finished;) {
      const Plan plan = decoder.plan(budget);
      auto at = static_cast<std::size_t>(*plan.start);
      std::vector<RowStats> stats;
      bool thinks = false;
      for (const Segment& segment : plan.segments) {
        encoded.put(at, segment);
        if (segment.layers != Layers::skip) thinking.put(at, segment);
        if (segment.layers != Layers::refill) decoded.put(at, segment);
        thinks = thinks || segment.layers != Layers::skip;
        at += segment.tokens.size();
        stats.resize(stats.size() + segment.outputs.size(), row(10 + below(9)));
      }
      const Events events = decoder.absorb(plan, stats);
      CHECK_EQ(events.ran_thinking, thinks);
      // E and D have every row that is not newer than the tokens given out, once.
      CHECK_EQ(encoded.tokens, Tokens(all.begin(), all.begin() + static_cast<int>(at)));
      CHECK_EQ(decoded.tokens, encoded.tokens);
      CHECK(static_cast<int>(encoded.tokens.size() - thinking.tokens.size()) < horizon);
      CHECK(std::equal(thinking.tokens.begin(), thinking.tokens.end(), encoded.tokens.begin()));
      all.insert(all.end(), events.committed.begin(), events.committed.end());
      finished = events.finished.has_value();
    }
    CHECK_EQ(static_cast<int>(all.size()) - prompt, random.max_tokens);
    for (int i = 0; i < static_cast<int>(decoded.h_factors.size()); ++i) {
      const bool train = rule == DmtdPromptRule::train;
      const bool head = (i - (train ? 0 : prompt)) % horizon == 0;
      const bool thinks = i < prompt && !train ? true : head;
      CHECK_EQ(decoded.h_factors[static_cast<std::size_t>(i)], thinks ? 1.0f : 0.0f);
    }
  }
}

}  // namespace
}  // namespace sbd
