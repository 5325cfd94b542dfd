// The policy of drafts on scripted machines and models: rows of such a cost, guesses that agree so
// often.
#include "decode/draft_policy.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "core/random.h"

namespace sbd {
namespace {

using Cost = std::function<double(int rows)>;  // ms
// Chance that the guess in a slot agrees, by boldness.
using Agreement = std::function<double(int slot, int boldness)>;

// How a model's drafts do on a machine.
struct World {
  Cost ms;
  Agreement agreement;
  double refinement[kBoldness.size()] = {0, 0, 0, 0};  // forwards beyond the first, per guess
  double noise = 0.05;                                 // of a forward's time
  int interrupted = 0;  // the first forwards of several rows: each takes ten times as long
};

double curve(int rows, std::initializer_list<std::pair<int, double>> points) {
  auto above = std::ranges::find_if(points, [&](const auto& point) { return point.first >= rows; });
  if (above == points.end()) return std::prev(above)->second * rows / std::prev(above)->first;
  if (above == points.begin()) return above->second;
  const auto below = std::prev(above);
  const double share = double(rows - below->first) / (above->first - below->first);
  return below->second + share * (above->second - below->second);
}

// Of a model of 0.6B read from memory, and of a tiny one in cache, on two cores.
double from_memory(int rows) {
  return curve(rows,
               {{1, 1.0}, {2, 1.02}, {4, 1.08}, {8, 1.11}, {16, 1.25}, {32, 2.17}, {64, 4.2}});
}
double from_cache(int rows) {
  return curve(rows, {{1, 1.0}, {4, 1.6}, {8, 2.8}, {16, 5.2}, {32, 10.4}, {64, 21.0}});
}

Agreement always(double chance) {
  return [=](int, int) { return chance; };
}

struct Played {
  double ms = 0;
  double tokens = 0;
  int most_drafted = 0;
  int drafts = 0;
  int for_every = 0;  // of them those that came with a draft behind every outcome
  double rate() const { return tokens / ms; }
};

// Plays the forwards of a lossless decoder, without any text.
class Player {
 public:
  Player(std::uint64_t seed, bool known = false) : seed_(seed), known_(known) {}

  void forward(const World& world, const DraftPolicy& policy, DraftPolicy* learns,
               ForwardCosts& costs, Played& run) {
    const RowPrice price{.costs = &costs};
    Draft draft = policy.choose(price, kMaxDraft);
    const bool verifies = pending_ > 1;
    int rows = pending_, block = 0;
    if (known_) {
      if (!verifies && draft.size > 1) {
        rows = 0;
        block = draft.size;
      }
    } else if (draft.size > 1 && !(verifies && draft.begins == Begins::alone)) {
      block = draft.size;
    }
    const bool every = draft.begins == Begins::every && verifies && block > 0;
    spend(world, rows + (every ? pending_ : 1) * block, costs, run);
    bool stands = block > 0;
    int tokens = 0;
    if (rows > 0) {
      int kept = 0;
      while (kept < pending_ - 1 && chance() < world.agreement(kept + 1, drafted_.boldness)) {
        ++kept;
      }
      tokens = kept + 1;
      if (verifies) {
        if (learns) learns->verified(drafted_, pending_ - 1, forwards_, kept);
        stands = stands && (every || kept == pending_ - 1);
        run.for_every += every ? 1 : 0;
        ++run.drafts;
      }
      run.tokens += tokens;
      if (learns) learns->ran(tokens);
      pending_ = 1;
    }
    if (!stands) return;
    drafted_ = learns ? learns->chosen() : draft;
    forwards_ = 1;
    const double more = world.refinement[drafted_.boldness] * (block - 1);
    for (int i = 0; i < static_cast<int>(more + chance()); ++i) {
      spend(world, block, costs, run);
      ++forwards_;
    }
    run.most_drafted = std::max(run.most_drafted, block);
    pending_ = block;
  }

 private:
  double chance() { return uniform(seed_, ++drawn_); }
  void spend(const World& world, int rows, ForwardCosts& costs, Played& run) {
    double ms = world.ms(rows) * (1 + world.noise * (2 * chance() - 1));
    if (rows > 1 && of_several_++ < world.interrupted) ms *= 10;
    costs.record(rows, ms);
    run.ms += ms;
  }

  std::uint64_t seed_;
  std::uint64_t drawn_ = 0;
  int of_several_ = 0;  // forwards of so many rows
  bool known_;
  int pending_ = 1;
  Draft drafted_ = {};
  int forwards_ = 1;
};

struct Learner {
  explicit Learner(bool behind_known = false, std::uint64_t seed = 1)
      : known(behind_known), player(seed, behind_known) {
    begin_text();
  }
  void begin_text() {
    policy = std::make_unique<DraftPolicy>(Draft{.size = 16, .boldness = kAsWritten}, false, known,
                                           0.0f, history);
  }
  Played run(const World& world, int tokens, int per_text = 0) {
    Played done;
    double next = per_text;
    while (done.tokens < tokens) {
      player.forward(world, *policy, policy.get(), costs, done);
      if (per_text > 0 && done.tokens > next) {
        begin_text();
        next += per_text;
      }
    }
    return done;
  }

  bool known;
  std::shared_ptr<DraftHistory> history = std::make_shared<DraftHistory>();
  std::unique_ptr<DraftPolicy> policy;
  ForwardCosts costs;
  Player player;
};

// Of a draft that is kept.
double rate_of(const World& world, const Draft& draft, bool known = false) {
  const DraftPolicy fixed(draft);
  Player player(7, known);
  ForwardCosts costs;
  Played run;
  while (run.tokens < 2000) player.forward(world, fixed, nullptr, costs, run);
  return run.rate();
}

struct Best {
  double once = 0, refined = 0, fused = 0, alone = 0, every = 0;
  double of_all() const { return std::max(once, refined); }
};

// Of all of them: decided at once or not, verified with the next draft or alone.
Best best_of(const World& world, bool known = false) {
  Best best;
  for (int size = 1; size <= kMaxDraft; ++size) {
    for (int boldness = 0; boldness < static_cast<int>(kBoldness.size()); ++boldness) {
      const auto try_it = [&](const Draft& draft, double& verified) {
        const double rate = rate_of(world, draft, known);
        double& made = boldness == 0 ? best.once : best.refined;
        made = std::max(made, rate);
        verified = std::max(verified, rate);
      };
      try_it({.size = size, .boldness = boldness}, best.fused);
      try_it({.size = size, .boldness = boldness, .begins = Begins::alone}, best.alone);
      if (!known && size <= 8) {
        try_it({.size = size, .boldness = boldness, .begins = Begins::every}, best.every);
      }
    }
  }
  return best;
}

TEST(draft_policy_comes_to_the_best_of_1_to_32) {
  for (const Cost& ms : {Cost(from_memory), Cost(from_cache)}) {
    for (const double chance : {0.0, 0.5, 0.67, 0.8, 0.95, 1.0}) {
      for (const bool known : {false, true}) {
        const World world{ms, always(chance)};
        Learner learner(known);
        learner.run(world, 600);
        const double rate = learner.run(world, 6000).rate();
        const double best = best_of(world, known).of_all();
        CHECK(rate > 0.93 * best);
      }
    }
  }
}

TEST(draft_policy_costs_nothing_where_drafts_are_worthless) {
  for (const Cost& ms : {Cost(from_memory), Cost(from_cache)}) {
    for (const int per_text : {0, 25}) {  // in one text or in short ones
      const World world{ms, always(0)};
      Learner learner;
      const Played run = learner.run(world, 4000, per_text);
      CHECK(run.rate() > 0.98 * rate_of(world, {}));
      CHECK(run.drafts > 10);  // yet it goes on trying
      CHECK(learner.run(world, 8000, per_text).drafts > 10);
    }
  }
  // Where rows are so dear that none could pay, not even that.
  const World dear{[](int rows) { return double(rows); }, always(1)};
  Learner learner;
  learner.run(dear, 400);
  CHECK_EQ(learner.run(dear, 4000).drafts, 0);
  const Played later = learner.run(dear, 40'000);  // rows may have come to cost less
  CHECK_IN(std::to_string(later.rate()), later.rate() > 0.99 * rate_of(dear, {}));
  CHECK(later.drafts > 0);
}

// Less of the time for one in vain after the other, never none, and more again where they are not.
TEST(draft_history_spends_by_what_came_of_it) {
  const auto earned = [](DraftHistory& history, int tokens) {
    const double before = history.credit();
    history.made(tokens);
    return history.credit() - before;
  };
  DraftHistory history;
  const double at_first = earned(history, 100);
  CHECK(at_first > 0 && at_first < 1);
  history.tried(0);
  CHECK(earned(history, 100) < 0.6 * at_first);
  for (int i = 0; i < 20; ++i) history.tried(0);
  const double least = earned(history, 100);
  CHECK(least > 0.2 * at_first);
  const double before = history.credit();
  history.tried(2);
  CHECK_EQ(history.credit(), before + 2);
  CHECK(earned(history, 100) > 1.5 * least);
}

TEST(draft_policy_is_good_from_the_first_text_on) {
  const World world{from_memory, always(0.9)};
  Learner learner;
  const double early = learner.run(world, 100, 25).rate();
  CHECK(early > 0.6 * best_of(world).of_all());
  CHECK(learner.run(world, 2000, 25).rate() > 0.93 * best_of(world).of_all());
}

TEST(draft_policy_follows_changes) {
  const World good{from_memory, always(0.95)}, bad{from_memory, always(0)};
  const World slow{from_cache, always(0.6)};
  const double best = best_of(good).of_all();
  struct Phase {
    const World& world;
    int tokens;
    double at_least;  // tokens a millisecond, of 1 without drafts
  };
  const Phase phases[] = {
      {good, 2000, 0.85 * best},  //
      {bad, 300, 0.78},           //
      {bad, 3000, 0.98},          //
      {good, 1500, 0.75 * best},  // it has found out within these
      {good, 1500, 0.95 * best},  //
      {slow, 300, 0.55},          // another machine, as it were
      {slow, 3000, 0.97},         //
      {good, 1500, 0.6 * best},   //
      {good, 1500, 0.93 * best},  //
  };
  constexpr int kLearners = 8;
  std::vector<double> rates(std::size(phases));
  for (std::uint64_t seed = 1; seed <= kLearners; ++seed) {
    Learner learner(false, seed);
    for (std::size_t i = 0; i < rates.size(); ++i) {
      rates[i] += learner.run(phases[i].world, phases[i].tokens).rate() / kLearners;
    }
  }
  for (std::size_t i = 0; i < rates.size(); ++i) {
    CHECK_IN("phase " + std::to_string(i) + ", " + std::to_string(rates[i]),
             rates[i] > phases[i].at_least);
  }
}

// None of which is long enough to look at what else might be better.
TEST(draft_policy_finds_out_in_short_texts) {
  const World dear{from_cache, always(0.98)}, cheap{from_memory, always(0.98)};
  const double best = best_of(cheap).of_all();
  constexpr int kLearners = 8;
  double rate = 0;
  for (std::uint64_t seed = 1; seed <= kLearners; ++seed) {
    Learner learner(false, seed);
    learner.run(dear, 1000, 12);
    learner.run(cheap, 1500, 12);
    rate += learner.run(cheap, 3000, 12).rate() / kLearners;
  }
  CHECK_IN(std::to_string(rate / best), rate > 0.9 * best);
}

// What drafts seemed to cost when something else had the machine.
TEST(draft_policy_gets_over_interruptions) {
  const World world{from_memory, always(0.97)};
  const double best = best_of(world).of_all();
  const auto rate = [&](int interrupted, int after) {
    World interrupts = world;
    interrupts.interrupted = interrupted;
    constexpr int kLearners = 8;
    double mean = 0;
    for (std::uint64_t seed = 1; seed <= kLearners; ++seed) {
      Learner learner(false, seed);
      learner.run(interrupts, after, 20);
      mean += learner.run(interrupts, 2000, 20).rate() / kLearners;
    }
    return mean;
  };
  for (const int interrupted : {1, 2, 3}) {
    CHECK_IN(std::to_string(interrupted), rate(interrupted, 500) > 0.93 * best);
  }
  // So often they are taken for the truth, but not for ever.
  CHECK(rate(4, 10'000) > 0.93 * best);
}

TEST(draft_policy_refines_where_it_pays) {
  const auto once_or_refined = [](double once, double refined) {
    return World{from_memory,
                 [=](int, int boldness) { return boldness == 0 ? once : refined; },
                 {0, 0.1, 0.2, 0.3}};
  };
  for (const auto& [once, refined] : {std::pair(0.3, 0.97), std::pair(0.95, 0.97)}) {
    const World world = once_or_refined(once, refined);
    const Best best = best_of(world);
    CHECK((best.once > 1.1 * best.refined) == (once > 0.9));  // the two are told apart
    CHECK((best.refined > 1.1 * best.once) == (once < 0.9));
    Learner learner;
    learner.run(world, 2000);
    CHECK(learner.run(world, 4000).rate() > 0.93 * best.of_all());
  }
}

TEST(draft_policy_verifies_alone_where_it_pays) {
  // Up to 8 rows cost nothing, and more very much.
  const auto steep = [](int rows) { return rows <= 8 ? 1.0 : 1 + 0.3 * (rows - 8); };
  for (const World& world : {World{steep, always(0.9)}, World{from_memory, always(0.98)}}) {
    const Best best = best_of(world);
    CHECK(std::max(best.alone, best.fused) > 1.02 * std::min(best.alone, best.fused));
    Learner learner;
    learner.run(world, 1000);
    CHECK(learner.run(world, 4000).rate() > 0.92 * best.of_all());
  }
}

// Where rows are cheap and a guess may well be wrong, and not where they are dear.
TEST(draft_policy_drafts_for_every_outcome_where_it_pays) {
  const World cheap{from_memory, always(0.6)}, dear{from_cache, always(0.6)};
  const Best best = best_of(cheap);
  CHECK(best.every > 1.05 * std::max(best.alone, best.fused));
  Learner learner;
  learner.run(cheap, 1000);
  const Played run = learner.run(cheap, 4000);
  CHECK(run.rate() > 0.95 * best.every);
  CHECK(run.for_every > 0.8 * run.drafts);
  Learner other;
  CHECK(other.run(dear, 4000).for_every < 40);
}

// The rows of a forward that others share: each pays for what its own add.
TEST(draft_policy_shrinks_drafts_among_many) {
  const auto chosen = [](int sequences) {
    DraftPolicy policy({.size = 16, .boldness = kAsWritten}, false, false, 0.0f,
                       std::make_shared<DraftHistory>());
    ForwardCosts costs;
    for (const int rows : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
      costs.record(rows, from_memory(rows));
      costs.record(sequences, from_memory(sequences));
    }
    for (int i = 0; i < 20; ++i) policy.verified({16, kAsWritten}, 15, 1, 6);
    return policy.choose({&costs, sequences, sequences - 1}, kMaxDraft).size;
  };
  CHECK(chosen(1) >= 6);
  CHECK(chosen(4) < chosen(1));
  CHECK_EQ(chosen(64), 1);
}

// What rows add to a noisy forward nobody knows to a few per cent.
TEST(draft_policy_wants_more_where_times_are_noisy) {
  const auto drafts = [](double noise) {  // of 200 rounds
    DraftPolicy policy({.size = 16}, true, false, 0.0f, std::make_shared<DraftHistory>());
    ForwardCosts costs;
    for (int i = 0; i < 100; ++i) {
      for (const int rows : {16, 24, 32, 48, 64}) {
        costs.record(rows, (1 + rows / 40.0) * (i % 2 ? 1 + noise : 1 - noise));
      }
    }
    int drafted = 0;
    for (int i = 0; i < 200; ++i) {
      const Draft draft = policy.choose({&costs, 16, 15}, kMaxDraft);
      if (draft.size > 1) {
        policy.verified(draft, draft.size - 1, 1, std::min(draft.size - 1, 4));
        ++drafted;
      }
      policy.ran(1);
    }
    return drafted;
  };
  CHECK(drafts(0.005) > 150);
  CHECK(drafts(0.15) < 20);
}

TEST(draft_policy_keeps_what_is_asked_for) {
  DraftPolicy fixed({.size = 16, .boldness = kAsWritten});
  ForwardCosts costs;
  costs.record(1, 1);
  costs.record(32, 100);
  fixed.ran(1);
  fixed.verified({16}, 15, 1, 0);
  CHECK_EQ(fixed.choose({&costs}, 8).size, 16);

  DraftPolicy rule({.size = 16, .boldness = kAsWritten}, /*rule_kept=*/true, false, 0.0f,
                   std::make_shared<DraftHistory>());
  CHECK_EQ(rule.choose({}, 100).size, 16);  // until something is known
  CHECK_EQ(rule.choose({}, 5).size, 5);
  for (int i = 0; i < 500; ++i) {
    const Draft draft = rule.choose({&costs}, 100);
    CHECK(draft.size == 1 || draft.boldness == kAsWritten);
    costs.record(1 + i % 9, 1);
    rule.ran(3);
  }
}

}  // namespace
}  // namespace sbd
