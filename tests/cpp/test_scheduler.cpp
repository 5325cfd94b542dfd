// The scheduler over a tiny real model: who runs when, what is admitted, and that neither company,
// nor how prompts are cut, nor what another sequence left changes a token or a bit.
#include <map>
#include <numeric>
#include <set>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "decode/forward_costs.h"
#include "decode/registry.h"
#include "kv_claims.h"
#include "prefix_index.h"
#include "scheduler.h"
#include "transformer_cases.h"

namespace sbd {
namespace {

using namespace test;

constexpr int kContext = 512;
constexpr TokenId kMaskToken = kVocab - 1;
constexpr std::size_t kPlenty = std::size_t{1} << 32;

// Settings under which a decoder of each kind runs.
struct Kind {
  std::string decoder;
  DecoderOptions options;
  float temperature = 0;
};

std::vector<Kind> kinds() {
  DecoderOptions sbd;
  sbd.has_mask_token = true;
  sbd.block.mask_token_id = kMaskToken;
  sbd.block.block_size = 6;
  sbd.block.unmask = {.rule = UnmaskRule::top_n, .top_n = 2};
  DecoderOptions dmtd;
  dmtd.has_layer_cut = true;
  dmtd.dmtd = {.horizon = 3, .prompt_rule = DmtdPromptRule::train};
  DecoderOptions blocks = sbd;
  blocks.named = {"sdar"};
  blocks.block.absolute_blocks = true;
  blocks.block.prompt_attention = PromptAttention::block_causal;
  blocks.block.commit_attention = CommitAttention::block;
  DecoderOptions within = blocks;
  within.named = {"fast_dllm_v2"};
  within.block.sub_block_size = 3;
  within.block.logit_shift = 1;
  within.block.seed_slot = true;
  DecoderOptions seeded = sbd;
  seeded.named = {"nemotron"};
  seeded.block.seed_slot = true;
  DecoderOptions uncached = sbd;
  uncached.named = {"llada"};
  uncached.block.prompt_attention = PromptAttention::full;
  uncached.block.commit_attention = CommitAttention::none;
  DecoderOptions shifted = uncached;
  shifted.named = {"dream"};
  shifted.block.logit_shift = 1;
  return {{"ntp", {}},
          {"sbd", sbd, 0.8f},
          {"sbd_lossless", sbd},
          {"nemotron", seeded},
          {"nemotron_spec", sbd, 0.8f},
          {"dmtd", dmtd, 0.8f},
          {"sdar", blocks},
          {"fast_dllm_v2", within, 0.8f},
          {"d2f", sbd},
          {"llada", uncached, 0.8f},
          {"dream", shifted}};
}

class Model {
 public:
  Model() : config_(make_config()), source_(config_, DType::f32, false), backend_(2) {
    model_ = std::make_unique<Transformer>(config_, source_, backend_);
  }
  Scheduler scheduler(std::size_t kv_budget = kPlenty, std::size_t prefix_cache = kPlenty,
                      int max_rows = 512) {
    return {*model_, {kContext, DType::f16, kv_budget, prefix_cache, max_rows}};
  }

 private:
  static ModelConfig make_config() {
    ModelConfig config = tiny_config("qwen3");
    config.num_hidden_layers = 3;
    config.layer_sections = {1, 1, 1};
    config.hidden_size = config.intermediate_size = 32;  // many tokens, on plain C++ too
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.mask_token_id = kMaskToken;
    return config;
  }
  ModelConfig config_;
  MemoryTensors source_;
  cpu::CpuBackend backend_;
  std::unique_ptr<Transformer> model_;
};

std::unique_ptr<Decoder> decoder_of(const Kind& kind, const Tokens& prompt, int max_tokens) {
  DecodeTask task;
  task.prompt = prompt;
  task.max_tokens = max_tokens;
  task.n_ctx = task.n_ctx_limit = kContext;
  task.sampling.temperature = kind.temperature;
  task.rules.logprobs = 2;
  return make_decoder(kind.decoder, std::move(task), kind.options);
}

Tokens prompt_of(int n, std::uint64_t seed) {
  Tokens tokens = random_tokens(n, seed);
  std::ranges::replace(tokens, kMaskToken, 0);
  return tokens;
}

Tokens joined_tokens(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Told {
  Tokens tokens;
  std::vector<float> logprobs;  // of each token, and of the best two in its place
  int prompt_rows = 0;
  int cached_tokens = 0;
  int forwards = 0;
  std::string error;
};

void take(std::map<SequenceId, Told>& told, const std::vector<SequenceEvents>& happened) {
  for (const SequenceEvents& events : happened) {
    Told& one = told[events.id];
    one.tokens.insert(one.tokens.end(), events.events.committed.begin(),
                      events.events.committed.end());
    for (const auto& scores : events.events.scores) {
      one.logprobs.push_back(scores->token.logprob);
      for (const TokenScore& best : scores->best) one.logprobs.push_back(best.logprob);
    }
    one.prompt_rows += events.prompt_rows;
    one.cached_tokens += events.cached_tokens;
    one.error = events.error;
    ++one.forwards;
  }
}

std::map<SequenceId, Told> run_all(Scheduler& scheduler) {
  std::map<SequenceId, Told> told;
  for (int i = 0; i < 10000; ++i) {
    const auto happened = scheduler.step();
    if (happened.empty()) return told;
    take(told, happened);
  }
  CHECK(false);
  return told;
}

Told run_one(Scheduler& scheduler, const Kind& kind, const Tokens& prompt, int max_tokens) {
  const SequenceId id = scheduler.add(prompt, decoder_of(kind, prompt, max_tokens));
  return run_all(scheduler)[id];
}

bool same_bits(const Told& a, const Told& b) {
  return a.tokens == b.tokens && identical(a.logprobs, b.logprobs);
}

// Alone and all decoders together, in forwards of any size, behind a system prompt that another has
// read or not: every text and log-probability to the bit.
TEST(scheduler_texts_do_not_depend_on_company_cuts_or_what_is_left) {
  Model model;
  std::vector<std::string> names = decoder_names();
  for (const Kind& kind : kinds()) std::erase(names, kind.decoder);
  CHECK(names.empty());
  const Tokens system = prompt_of(70, 1);
  const Tokens prompt = joined_tokens(system, prompt_of(9, 2));
  std::map<std::string, Told> expected;
  for (const Kind& kind : kinds()) {
    Scheduler fresh = model.scheduler(kPlenty, 0);
    const Told told = run_one(fresh, kind, prompt, 40);
    CHECK_EQ(told.tokens.size(), 40u);
    CHECK_EQ(told.logprobs.size(), 3 * 40u);
    CHECK_EQ(told.cached_tokens, 0);
    expected[kind.decoder] = told;
  }
  for (const int max_rows : {1, 7, 64, 512}) {
    for (const bool reuses : {false, true}) {
      Scheduler scheduler = model.scheduler(kPlenty, reuses ? kPlenty : 0, max_rows);
      const auto check = [&](const Kind& kind, const Told& told) {
        const std::string where = kind.decoder + ", " + std::to_string(max_rows) + " rows";
        CHECK_IN(where, same_bits(told, expected[kind.decoder]));
        const Sharing sharing = decoder_of(kind, prompt, 1)->sharing();
        CHECK_IN(where, told.cached_tokens % sharing.unit == 0);
        if (!reuses) return;
        CHECK_IN(where, (told.cached_tokens > 0) == !sharing.kind.empty());
        if (sharing.kind == kCausal) CHECK_IN(where, told.cached_tokens >= 70);
      };
      for (const Kind& kind : kinds()) {
        if (reuses) run_one(scheduler, kind, joined_tokens(system, prompt_of(5, 3)), 4);
        check(kind, run_one(scheduler, kind, prompt, 40));
      }
      std::map<SequenceId, Kind> running;
      for (const Kind& kind : kinds()) {
        running[scheduler.add(prompt, decoder_of(kind, prompt, 40))] = kind;
      }
      const auto told = run_all(scheduler);
      for (const auto& [id, kind] : running) check(kind, told.at(id));
    }
  }
}

TEST(scheduler_a_second_turn_begins_behind_the_first) {
  Model model;
  for (const Kind& kind : kinds()) {
    Scheduler scheduler = model.scheduler();
    const Tokens first = prompt_of(90, 5);
    const Told told = run_one(scheduler, kind, first, 30);
    const Tokens second = joined_tokens(joined_tokens(first, told.tokens), prompt_of(6, 7));
    Scheduler fresh = model.scheduler(kPlenty, 0);
    const Told expected = run_one(fresh, kind, second, 20);
    const Told again = run_one(scheduler, kind, second, 20);
    CHECK_IN(kind.decoder, same_bits(again, expected));
    const Sharing sharing = decoder_of(kind, second, 1)->sharing();
    const int least = sharing.text ? 119 - 6 : 90;  // the text's last block may not be cached
    if (!sharing.kind.empty()) {
      CHECK_IN(kind.decoder, again.cached_tokens >= least / sharing.unit * sharing.unit);
      CHECK_EQ(again.prompt_rows + again.cached_tokens, expected.prompt_rows);
    }
  }
}

TEST(scheduler_verified_text_is_next_token_predictions_under_every_rule) {
  Model model;
  const RuleOptions rules{.logit_bias = {{5, 2.0f}, {6, -3.0f}},
                          .presence_penalty = 0.7f,
                          .frequency_penalty = 0.4f,
                          .repetition_penalty = 1.3f,
                          .logprobs = 2};
  const Sampling samplings[] = {{},
                                {.temperature = 0.7f},
                                {.temperature = 1.2f, .top_k = 20, .top_p = 0.9f},
                                {.temperature = 1.2f, .min_p = 0.05f}};
  for (unsigned seed = 0; seed < 8; ++seed) {
    const Tokens prompt = prompt_of(20, 60 + seed);
    const auto run = [&](const std::string& decoder) {
      const auto all = kinds();
      const Kind& kind = *std::ranges::find(all, decoder, &Kind::decoder);
      DecodeTask task;
      task.prompt = prompt;
      task.max_tokens = 40;
      task.n_ctx = task.n_ctx_limit = kContext;
      task.rules = rules;
      task.sampling = samplings[seed % std::size(samplings)];
      task.sampling.seed = seed;
      Scheduler scheduler = model.scheduler(kPlenty, 0);
      scheduler.add(prompt, make_decoder(decoder, task, kind.options));
      std::vector<TokenScore> said;
      for (auto happened = scheduler.step(); !happened.empty(); happened = scheduler.step()) {
        const Events& events = happened[0].events;
        CHECK_EQ(events.scores.size(), events.committed.size());
        for (std::size_t i = 0; i < events.committed.size(); ++i) {
          said.push_back(events.scores[i]->token);
          CHECK_EQ(said.back().token, events.committed[i]);
        }
      }
      return said;
    };
    const auto expected = run("ntp");
    for (const std::string decoder : {"sbd_lossless", "nemotron_spec"}) {
      const auto said = run(decoder);
      CHECK_EQ(said.size(), expected.size());
      for (std::size_t i = 0; i < said.size(); ++i) {
        CHECK_EQ(said[i].token, expected[i].token);
        CHECK_EQ(said[i].logprob, expected[i].logprob);  // the same bits
      }
    }
    CHECK_EQ(run("sbd").size(), expected.size());
    CHECK_EQ(run("d2f").size(), expected.size());
    CHECK_EQ(run("llada").size(), expected.size());
  }
}

TEST(scheduler_what_begins_alike_is_read_once) {
  Model model;
  Scheduler scheduler = model.scheduler();
  const Kind ntp = kinds()[0];
  const Tokens system = prompt_of(300, 1);
  std::map<SequenceId, Tokens> prompts;
  for (int i = 0; i < 16; ++i) {
    const Tokens prompt = joined_tokens(system, prompt_of(3 + i, 20 + static_cast<unsigned>(i)));
    prompts[scheduler.add(prompt, decoder_of(ntp, prompt, 5))] = prompt;
  }
  const auto told = run_all(scheduler);
  int rows = 0;
  for (const auto& [id, one] : told) {
    rows += one.prompt_rows;
    Scheduler fresh = model.scheduler(kPlenty, 0);
    CHECK(run_one(fresh, ntp, prompts.at(id), 5).tokens == one.tokens);
  }
  CHECK(rows < 300 + 16 * 20);
}

TEST(scheduler_decoding_goes_on_while_prompts_are_read) {
  Model model;
  Scheduler scheduler = model.scheduler();
  const Kind ntp = kinds()[0];
  const SequenceId decoding = scheduler.add({1, 2, 3}, decoder_of(ntp, {1, 2, 3}, 400));
  scheduler.step();
  std::set<SequenceId> reading;
  for (unsigned i = 0; i < 8; ++i) {
    const Tokens prompt = prompt_of(90, 30 + i);
    reading.insert(scheduler.add(prompt, decoder_of(ntp, prompt, 1)));
  }
  std::map<SequenceId, Told> told;
  int forwards = 0;
  while (!reading.empty()) {
    const auto happened = scheduler.step();
    take(told, happened);
    ++forwards;
    for (const auto& events : happened) {
      if (events.events.finished) reading.erase(events.id);
    }
    CHECK_EQ(told[decoding].forwards, forwards);  // a token from every forward
    CHECK(forwards < 1000);
  }
}

TEST(scheduler_long_prompts_are_not_starved_by_short_ones) {
  Model model;
  Scheduler scheduler = model.scheduler();
  const Kind ntp = kinds()[0];
  scheduler.add({1, 2, 3}, decoder_of(ntp, {1, 2, 3}, 500));
  const Tokens long_one = prompt_of(450, 8);
  const SequenceId waits = scheduler.add(long_one, decoder_of(ntp, long_one, 1));
  for (unsigned i = 0; i < 400; ++i) {
    for (int j = 0; j < 4; ++j) {  // more rows of short prompts than a forward takes
      const Tokens prompt = prompt_of(200, 100 + 4 * i + static_cast<unsigned>(j));
      scheduler.add(prompt, decoder_of(ntp, prompt, 1));
    }
    for (const auto& events : scheduler.step()) {
      if (events.id == waits && events.events.finished) return;
    }
  }
  CHECK(false);
}

TEST(scheduler_admits_by_bytes) {
  Model model;
  const Kind ntp = kinds()[0];
  Scheduler measure = model.scheduler();
  // A cache's bytes come in whole pages, so equal requests are what is counted.
  std::size_t one = 0;
  for (std::size_t budget = 4096; one == 0; budget += 4096) {
    try {
      model.scheduler(budget).check(*decoder_of(ntp, prompt_of(40, 1), 20));
      one = budget;
    } catch (const Error&) {
    }
  }
  Scheduler scheduler = model.scheduler(2 * one, 0);
  for (unsigned i = 0; i < 5; ++i) {
    scheduler.add(prompt_of(40, 40 + i), decoder_of(ntp, prompt_of(40, 40 + i), 20));
  }
  int most = 0;
  std::size_t finished = 0;
  for (auto happened = scheduler.step(); !happened.empty(); happened = scheduler.step()) {
    most = std::max(most, static_cast<int>(happened.size()));
    for (const auto& events : happened) finished += events.events.finished ? 1 : 0;
  }
  CHECK_EQ(most, 2);  // two at a time, in order
  CHECK_EQ(finished, 5u);
  CHECK_THROWS_WITH(scheduler.add(prompt_of(40, 1), decoder_of(ntp, prompt_of(40, 1), 472)),
                    format("more than the `kv_budget` of {}", 2 * one));
}

TEST(claims_can_end_in_some_order_or_in_none) {
  Random random(5);
  int both = 0;
  for (int i = 0; i < 3000; ++i) {
    std::vector<Claim> claims;
    const int n = random.below(6);
    for (int j = 0; j < n; ++j) {
      const auto held = static_cast<std::size_t>(random.below(5));
      claims.push_back({held, held + static_cast<std::size_t>(random.below(8))});
    }
    const auto budget = static_cast<std::size_t>(random.below(20));
    std::size_t held = 0;
    for (const Claim& claim : claims) held += claim.held;
    bool some = false;
    std::vector<int> order(claims.size());
    std::iota(order.begin(), order.end(), 0);
    do {
      std::size_t free = budget - held;
      bool ends = held <= budget;
      for (const int j : order) {
        const Claim& claim = claims[static_cast<std::size_t>(j)];
        ends = ends && claim.most - claim.held <= free;
        free += claim.held;
      }
      some = some || ends;
    } while (std::ranges::next_permutation(order).found);
    CHECK_EQ(all_can_end(claims, budget), some);
    both += some;
  }
  CHECK(both > 500 && both < 2500);
}

// Each may write to the end of the context, which four could at once; that texts are short is seen
// after the first.
TEST(scheduler_admits_by_what_is_likely_and_none_waits_for_ever) {
  // Thousands of tokens, counted in bytes: plain C++ would take a minute to the same counts.
  const ForcedIsa fastest(all_kernels().front()->name);
  Model model;
  for (const Kind& kind : kinds()) {
    // Its first forward has all positions.
    const bool uncached = kind.options.block.commit_attention == CommitAttention::none;
    const int length = uncached ? 60 : 472;
    const std::size_t one = model.scheduler().check(*decoder_of(kind, prompt_of(40, 0), length));
    Scheduler plenty = model.scheduler(kPlenty, 0);
    Scheduler scheduler = model.scheduler(4 * one, one);
    run_one(scheduler, kind, prompt_of(40, 99), 5);
    std::map<SequenceId, Tokens> expected;
    for (unsigned i = 0; i < 6; ++i) {
      const Tokens prompt = prompt_of(40, i);
      const SequenceId id = scheduler.add(prompt, decoder_of(kind, prompt, length));
      expected[id] = run_one(plenty, kind, prompt, length).tokens;
    }
    int most = 0;
    std::map<SequenceId, Told> told;
    for (int i = 0; i < 10000; ++i) {
      const auto happened = scheduler.step();
      if (happened.empty()) break;
      CHECK(scheduler.usage().kv_used + scheduler.usage().kv_cached <= 4 * one);
      most = std::max(most, scheduler.usage().admitted);
      take(told, happened);
    }
    for (const auto& [id, tokens] : expected) CHECK(told[id].tokens == tokens);
    CHECK_EQ(scheduler.usage().kv_used, 0u);
    CHECK_EQ(most, uncached ? 4 : 5);
  }
}

TEST(scheduler_a_cancelled_sequence_frees_its_room_and_leaves_its_prompt) {
  Model model;
  const Kind ntp = kinds()[0];
  Scheduler scheduler = model.scheduler();
  const Tokens prompt = prompt_of(100, 4);
  const SequenceId id = scheduler.add(prompt, decoder_of(ntp, prompt, 50));
  for (int i = 0; i < 3; ++i) scheduler.step();
  scheduler.remove(id);
  scheduler.remove(id);  // it is gone
  CHECK(scheduler.step().empty());
  CHECK_EQ(run_one(scheduler, ntp, prompt, 5).cached_tokens, 99);

  const SequenceId waiting = scheduler.add(prompt, decoder_of(ntp, prompt, 5));
  scheduler.remove(waiting);  // before it was admitted
  CHECK(scheduler.step().empty());
}

TEST(scheduler_parked_caches_keep_to_their_bytes) {
  Model model;
  const Kind ntp = kinds()[0];
  Scheduler small = model.scheduler(kPlenty, 4096);  // less than any cache takes
  const Tokens prompt = prompt_of(100, 4);
  run_one(small, ntp, prompt, 5);
  CHECK_EQ(run_one(small, ntp, prompt, 5).cached_tokens, 0);
}

TEST(prefix_index_finds_the_longest) {
  Random random(3);
  PrefixIndex index;
  std::vector<PrefixIndex::Entry> all;
  for (int i = 0; i < 300; ++i) {
    Tokens tokens(static_cast<std::size_t>(1 + random.below(8)));
    for (TokenId& token : tokens) token = random.below(3);
    const std::string kind = random.below(2) == 0 ? "a" : "b";
    index.add(kind, tokens, i);
    all.push_back({kind, tokens, i});
    if (i % 5 == 4) {
      const auto gone = all.begin() + random.below(static_cast<int>(all.size()));
      index.remove(gone->kind, gone->tokens, gone->id);
      all.erase(gone);
    }
    Tokens asked(static_cast<std::size_t>(random.below(9)));
    for (TokenId& token : asked) token = random.below(3);
    int longest = 0;
    for (const auto& entry : all) {
      if (entry.kind != kind) continue;
      const auto agree = std::ranges::mismatch(entry.tokens, asked).in1 - entry.tokens.begin();
      longest = std::max(longest, static_cast<int>(agree));
    }
    const auto match = index.longest(kind, asked);
    CHECK_EQ(match ? match->length : 0, longest);
  }
}

TEST(forward_costs_lie_on_lines_between_what_was_measured) {
  ForwardCosts costs;
  CHECK_EQ(costs.ms(5), 0.0);
  costs.record(1, 10);
  CHECK_EQ(costs.ms(1), 10.0);
  CHECK_EQ(costs.ms(64), 10.0);  // nothing says how it grows
  costs.record(16, 25);
  CHECK_EQ(costs.ms(1), 10.0);
  CHECK_EQ(costs.ms(6), 15.0);
  CHECK_EQ(costs.ms(31), 40.0);
  CHECK_EQ(costs.max_rows(), 16);
  for (int i = 0; i < 60; ++i) costs.record(16, 40);  // another state of the machine
  CHECK(std::abs(costs.ms(16) - 40) < 0.1);
}

}  // namespace
}  // namespace sbd
