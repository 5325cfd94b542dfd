// What holds of any decoder on any task, on a fake model: fake_model.h's run() checks that plans
// fit the cache, that every position is decided once and given out as decided, and that it ends.
#include <numeric>

#include "decode/d2f.h"
#include "decode/full_context.h"
#include "decode/lossless.h"
#include "decode/ntp.h"
#include "decode/set_block.h"
#include "fake_model.h"
#include "reference.h"

namespace sbd {
namespace {

using namespace test;

DecodeTask random_task(Random& random) {
  DecodeTask task;
  task.prompt.resize(static_cast<std::size_t>(1 + random.below(20)));
  std::iota(task.prompt.begin(), task.prompt.end(), random.below(10));
  task.max_tokens = 1 + random.below(40);
  task.n_ctx = static_cast<int>(task.prompt.size()) + 1 + random.below(50);
  if (random.below(2) == 0) task.eos_token_ids = {kEos};
  return task;
}

Unmask random_rule(Random& random) {
  constexpr float kGammas[] = {0.0f, 0.1f, 0.35f, 1.5f, kInf};
  Unmask unmask;
  unmask.rule = static_cast<UnmaskRule>(random.below(4));
  unmask.proxy = static_cast<Proxy>(random.below(4));
  unmask.gamma = kGammas[random.below(5)];
  unmask.confidence_threshold = 0.5f;
  unmask.top_n = 1 + random.below(4);
  return unmask;
}

int random_size(Random& random, const DecodeTask& task) {
  return 1 + random.below(std::min(task.n_ctx, 17));
}

TEST(random_lossless_text_is_next_token_predictions) {
  Random random(1);
  int agreed = 0, fewer = 0, stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    DecodeTask task = random_task(random);
    if (random.below(2) == 0) {
      task.sampling = {.temperature = 1.0f, .seed = static_cast<std::uint64_t>(round)};
    }
    const LosslessMethod method{.mask_token_id = kMask,
                                .block_size = random_size(random, task),
                                .unmask = random_rule(random),
                                .fused = random.below(2) == 0,
                                .begins = random.below(2) == 0 ? Begins::fused : Begins::every};
    NtpDecoder ntp(task);
    const Outcome expected = run(ntp, task, /*agreeing=*/true);
    LosslessDecoder decoder(task, method);
    const Outcome outcome = run(decoder, task, /*agreeing=*/true);
    CHECK_EQ(outcome.tokens, expected.tokens);
    CHECK_EQ(outcome.finished, expected.finished);
    CHECK(outcome.most_accepted <= method.block_size);
    if (method.block_size == 1) CHECK_EQ(outcome.nfe, expected.nfe);
    agreed += outcome.most_accepted > 2 ? 1 : 0;
    fewer += outcome.nfe < expected.nfe ? 1 : 0;
    stopped += outcome.finished == FinishReason::stop ? 1 : 0;

    LosslessDecoder cut(task, method);
    check_same(run(cut, task, /*agreeing=*/true, 1 + random.below(24)), outcome);
  }
  CHECK(agreed > 1000 && fewer > 500 && stopped > 300);  // the draw is worth something
}

// A draft behind every outcome is one that a forward less is needed for where some guess is wrong.
TEST(random_lossless_drafts_of_every_outcome_take_fewer_forwards) {
  Random random(8);
  int forwards[] = {0, 0};
  for (int round = 0; round < 300; ++round) {
    DecodeTask task = random_task(random);
    task.max_tokens += 60;  // most of which is not near the end
    task.n_ctx += 160;
    const int block_size = 2 + random.below(4);
    Outcome outcomes[2];
    for (const bool every : {false, true}) {
      LosslessDecoder decoder(task, {.mask_token_id = kMask,
                                     .block_size = block_size,
                                     .unmask = gamma(kInf),
                                     .begins = every ? Begins::every : Begins::fused});
      outcomes[every] = run(decoder, task, /*agreeing=*/true);
      forwards[every] += outcomes[every].nfe;
    }
    CHECK_EQ(outcomes[0].tokens, outcomes[1].tokens);
  }
  CHECK(forwards[1] < 0.9 * forwards[0]);
}

// Whatever the policy takes it for: blocks of all sizes and rules, none, and from one to another.
TEST(random_lossless_text_does_not_depend_on_the_policy) {
  Random random(5);
  int drafted = 0, fewer = 0, branches = 0;
  const auto history = std::make_shared<DraftHistory>();
  ForwardCosts costs;
  for (int round = 0; round < 3000; ++round) {
    DecodeTask task = random_task(random);
    if (random.below(2) == 0) {
      task.sampling = {.temperature = 1.0f, .seed = static_cast<std::uint64_t>(round)};
    }
    NtpDecoder ntp(task);
    const Outcome expected = run(ntp, task, /*agreeing=*/true);
    LosslessDecoder decoder(task, {.mask_token_id = kMask,
                                   .block_size = random_size(random, task),
                                   .unmask = random_rule(random),
                                   .fused = random.below(2) == 0,
                                   .history = history,
                                   .rule_kept = random.below(2) == 0});
    CHECK_EQ(decoder.most_positions(), ntp.most_positions());
    const int rows = random.below(2) == 0 ? 512 : 24;
    const Outcome outcome = run(decoder, task, /*agreeing=*/true, rows, &costs);
    CHECK_EQ(outcome.tokens, expected.tokens);
    CHECK_EQ(outcome.finished, expected.finished);
    drafted += outcome.most_accepted > 1 ? 1 : 0;
    fewer += outcome.nfe < expected.nfe ? 1 : 0;
    branches += outcome.branches;
  }
  CHECK(drafted > 1000 && fewer > 500 && branches > 100);
}

BlockMethod random_method(Random& random, const DecodeTask& task) {
  BlockMethod method{.mask_token_id = kMask,
                     .block_size = random_size(random, task),
                     .schedule = static_cast<Schedule>(random.below(2)),
                     .unmask = random_rule(random),
                     .past_eos = random.below(2) == 0};
  if (const int size = random.below(4)) method.sub_block_size = size;
  if (random.below(2) == 0) method.steps = 1 + random.below(20);
  if (random.below(4) == 0) {
    method.logit_shift = random.below(2);
    if (random.below(2) == 0) method.block_size.reset();
    method.prompt_attention = PromptAttention::full;
    method.commit_attention = CommitAttention::none;
    return method;
  }
  method.seed_slot = random.below(2) == 0;
  method.logit_shift = method.seed_slot ? random.below(2) : 0;
  method.prompt_attention = static_cast<PromptAttention>(random.below(3));
  method.commit_attention = static_cast<CommitAttention>(random.below(2));
  method.absolute_blocks =
      method.prompt_attention != PromptAttention::bidirectional && random.below(2) == 0;
  return method;
}

std::unique_ptr<Decoder> blockwise(const DecodeTask& task, const BlockMethod& method) {
  if (method.commit_attention == CommitAttention::none) {
    return std::make_unique<FullContextDecoder>(task, method);
  }
  return std::make_unique<SetBlockDecoder>(task, method);
}

// However the prompt is cut into forwards, whatever the family.
TEST(random_families_end_and_never_see_how_the_prompt_is_cut) {
  Random random(2);
  int stopped = 0, filled = 0, parallel = 0;
  for (int round = 0; round < 5000; ++round) {
    DecodeTask task = random_task(random);
    if (random.below(2) == 0) {
      task.sampling = {.temperature = 1.0f, .seed = static_cast<std::uint64_t>(round)};
    }
    const BlockMethod method = random_method(random, task);
    const auto decoder = blockwise(task, method);
    const Outcome outcome = run(*decoder, task);
    const auto cut = blockwise(task, method);
    check_same(run(*cut, task, /*agreeing=*/false, 1 + random.below(24)), outcome);

    const int tokens = static_cast<int>(outcome.tokens.size());
    if (outcome.finished == FinishReason::length) {
      CHECK_EQ(tokens, task.tokens_wanted());
      CHECK(outcome.nfe <= tokens);  // an EOS may cut what forwards have decided
    }
    stopped += outcome.finished == FinishReason::stop ? 1 : 0;
    filled += tokens + static_cast<int>(task.prompt.size()) == task.n_ctx ? 1 : 0;
    parallel += outcome.nfe < tokens ? 1 : 0;
  }
  CHECK(stopped > 500 && filled > 500 && parallel > 1500);
}

TEST(random_d2f_ends) {
  Random random(3);
  const auto share = [&] { return static_cast<float>(random.below(11)) / 10; };
  int stopped = 0, filled = 0;
  for (int round = 0; round < 3000; ++round) {
    DecodeTask task = random_task(random);
    if (random.below(2) == 0) {
      task.sampling = {.temperature = 1.0f, .seed = static_cast<std::uint64_t>(round)};
    }
    D2fDecoder decoder(task, {.mask_token_id = kMask,
                              .block_size = random_size(random, task),
                              .logit_shift = random.below(2),
                              .block_add_threshold = share(),
                              .decoded_token_threshold = share(),
                              .skip_threshold = share()});
    const Outcome outcome = run(decoder, task);
    const int tokens = static_cast<int>(outcome.tokens.size());
    if (outcome.finished == FinishReason::length) CHECK_EQ(tokens, task.tokens_wanted());
    stopped += outcome.finished == FinishReason::stop ? 1 : 0;
    filled += tokens + static_cast<int>(task.prompt.size()) == task.n_ctx ? 1 : 0;
  }
  CHECK(stopped > 300 && filled > 300);
}

// One block in flight at a time is a family's loop whose prompt is one block and whose blocks are
// kept as they were denoised: another state machine, the same forwards.
TEST(random_d2f_of_one_block_in_flight_is_block_by_block) {
  Random random(4);
  for (int round = 0; round < 1000; ++round) {
    DecodeTask task = random_task(random);
    const int block_size = 1 + random.below(9);
    task.max_tokens = block_size * (1 + random.below(6));  // D2F decides its last block to the end
    task.n_ctx = static_cast<int>(task.prompt.size()) + task.max_tokens;
    const float threshold = random.below(2) == 0 ? 0.5f : 1.0f;
    D2fDecoder d2f(task, {.mask_token_id = kMask,
                          .block_size = block_size,
                          .block_add_threshold = 1,
                          .skip_threshold = threshold});
    SetBlockDecoder blocks(
        task, {.mask_token_id = kMask,
               .block_size = block_size,
               .unmask = {.rule = UnmaskRule::confidence, .confidence_threshold = threshold},
               .past_eos = true,
               .prompt_attention = PromptAttention::bidirectional,
               .commit_attention = CommitAttention::block});
    check_same(run(d2f, task), run(blocks, task));
  }
}

}  // namespace
}  // namespace sbd
