// Texts under a grammar, on a fake model: next-token decoding's as a plain loop has them, a
// verified text the same, and of any block decoder one that the grammar allows.
#include "decode/constraint.h"

#include <memory>
#include <utility>

#include "decode/choices.h"
#include "decode/dmtd.h"
#include "decode/lossless.h"
#include "decode/ntp.h"
#include "decode/set_block.h"
#include "fake_model.h"

namespace sbd {
namespace {

using namespace test;

std::uint64_t hash(std::span<const TokenId> tokens, std::uint64_t seed) {
  std::uint64_t key = seed;
  for (const TokenId token : tokens) key = combine(key, static_cast<std::uint64_t>(token));
  return mix64(key);
}

TokenSet set_of(std::span<const TokenId> tokens) {
  TokenSet set(4);
  for (const TokenId token : tokens) insert(set, token);
  return set;
}

// What may come is a function of all tokens before it.
class Scripted : public Constraint {
 public:
  explicit Scripted(std::uint64_t seed) : seed_(seed) {}

  TokenSet allowed() override {
    Tokens all;
    const std::uint64_t key = hash(text_, seed_);
    for (TokenId token = 0; token < 30 && !ended(); ++token) {
      if (token != kEos && combine(key, static_cast<std::uint64_t>(token)) % 4 == 0) {
        all.push_back(token);
      }
    }
    if (all.empty() || key % 5 == 0) all.push_back(kEos);
    return set_of(all);
  }
  bool consume(TokenId token) override {
    // As grammars of bytes do, it takes tokens that it would split in another way.
    if (token == kEos || token >= 30 || ended()) return false;
    text_.push_back(token);
    return true;
  }
  void roll_back(int n) override { text_.resize(text_.size() - static_cast<std::size_t>(n)); }
  std::vector<TokenId> forced() override {
    const std::uint64_t key = hash(text_, seed_);
    Tokens all = text_;
    for (std::uint64_t i = 0; i < key / 7 % 9 && key % 3 == 0 && !ends(all); ++i) {
      const auto token = static_cast<TokenId>(combine(key, i) % 30);
      all.push_back(token == kEos ? 8 : token);
    }
    return {all.begin() + static_cast<std::ptrdiff_t>(text_.size()), all.end()};
  }
  bool ended() override { return ends(text_); }

 private:
  bool ends(const Tokens& all) const { return all.size() > 2 && hash(all, seed_) % 13 == 0; }

  std::uint64_t seed_;
  Tokens text_;
};

// A list of what may stand at each place; where it is one token, that is forced.
class Template final : public Constraint {
 public:
  explicit Template(std::vector<Tokens> places) : places_(std::move(places)) {}

  TokenSet allowed() override {
    Tokens all = ended() ? Tokens{} : places_[at_];
    if (ended() || at_ % 6 == 5) all.push_back(kEos);
    return set_of(all);
  }
  bool consume(TokenId token) override {
    if (ended() || token == kEos || !contains(set_of(places_[at_]), token)) return false;
    ++at_;
    return true;
  }
  void roll_back(int n) override { at_ -= static_cast<std::size_t>(n); }
  std::vector<TokenId> forced() override {
    Tokens tokens;
    for (std::size_t i = at_; i < places_.size() && places_[i].size() == 1 && i % 6 != 5; ++i) {
      tokens.push_back(places_[i].front());
    }
    return tokens;
  }
  bool ended() override { return at_ == places_.size(); }

 private:
  std::vector<Tokens> places_;
  std::size_t at_ = 0;
};

class Fixed final : public Grammar {
 public:
  explicit Fixed(std::function<std::unique_ptr<Constraint>()> begin) : begin_(std::move(begin)) {}
  std::string_view name() const override { return "regex"; }
  int vocab_size() const override { return 128; }
  std::unique_ptr<Constraint> begin() const override { return begin_(); }

 private:
  std::function<std::unique_ptr<Constraint>()> begin_;
};

std::shared_ptr<const Grammar> scripted(std::uint64_t seed) {
  return std::make_shared<Fixed>([=] { return std::make_unique<Scripted>(seed); });
}

std::vector<Tokens> random_places(std::uint64_t seed) {
  std::vector<Tokens> places(1 + seed % 40);
  for (std::size_t i = 0; i < places.size(); ++i) {
    const std::uint64_t key = combine(seed, i);
    const std::uint64_t n = key % 3 == 0 ? 4 : 1;
    for (std::uint64_t j = 0; j < n; ++j) {
      const auto token = static_cast<TokenId>(combine(key, j) % 30);
      places[i].push_back(token == kEos ? 8 : token);
    }
  }
  return places;
}

std::shared_ptr<const Grammar> templated(const std::vector<Tokens>& places) {
  return std::make_shared<Fixed>([=] { return std::make_unique<Template>(places); });
}

DecodeTask random_task(std::uint64_t seed, std::shared_ptr<const Grammar> grammar) {
  DecodeTask task = test::task({1, 2, static_cast<TokenId>(seed % 5)}, 1 + int(seed % 37));
  if (seed % 2 == 0) task.sampling = {.temperature = 1.0f, .seed = seed};
  task.rules.grammar = std::move(grammar);
  return task;
}

// Next-token decoding in a plain loop: what is forced comes as it is, all else by a row.
Outcome plain_loop(const DecodeTask& task) {
  Outcome outcome;
  const auto constraint = task.rules.grammar->begin();
  const auto add = [&](TokenId token) {
    outcome.tokens.push_back(token);
    if (token == kEos) {
      outcome.finished = FinishReason::stop;
      return true;
    }
    CHECK(constraint->consume(token));
    return static_cast<int>(outcome.tokens.size()) == task.max_tokens;
  };
  for (bool last = false; !last;) {
    const Tokens forced = constraint->forced();
    if (forced.empty()) {
      Tokens seen = task.prompt;
      seen.insert(seen.end(), outcome.tokens.begin(), outcome.tokens.end());
      RowStats stats = agreeing_row(seen, static_cast<int>(seen.size()) - 1,
                                    Segment{.tokens = {}, .sampling = task.sampling});
      const auto rules = std::make_shared<LogitRules>(LogitRules{.allowed = constraint->allowed()});
      follow_rules({.rules = rules}, stats);
      last = add(task.choose(stats));
    }
    std::size_t given = 0;
    while (given < forced.size() && !last) last = add(forced[given++]);
    const bool all = given == forced.size();
    if (outcome.finished != FinishReason::stop && all && constraint->ended()) {
      outcome.finished = FinishReason::complete;
      last = true;
    }
  }
  return outcome;
}

TEST(constrained_texts_are_the_plain_loops) {
  int complete = 0, stopped = 0, fewer = 0, branches = 0;
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    const auto grammar = seed % 3 == 0 ? templated(random_places(seed)) : scripted(seed);
    const DecodeTask task = random_task(seed, grammar);
    const Outcome expected = plain_loop(task);
    NtpDecoder ntp(task);
    const Outcome by_ntp = run(ntp, task, /*agreeing=*/true, 1 + int(seed % 24));
    CHECK_EQ(by_ntp.tokens, expected.tokens);
    CHECK(by_ntp.finished == expected.finished);
    DecodeTask scored = task;
    scored.rules.logprobs = 0;
    NtpDecoder one_by_one(scored);
    CHECK_EQ(run(one_by_one, task, /*agreeing=*/true).tokens, expected.tokens);
    const LosslessMethod method{.mask_token_id = kMask,
                                .block_size = 1 + int(seed % 16),
                                .unmask = gamma(seed % 4 == 0 ? 0.1f : kInf),
                                .fused = seed % 5 != 0,
                                .begins = seed % 2 == 0 ? Begins::fused : Begins::every};
    LosslessDecoder lossless(task, method);
    const Outcome verified = run(lossless, task, /*agreeing=*/true);
    CHECK_EQ(verified.tokens, expected.tokens);
    branches += verified.branches;
    CHECK(verified.finished == expected.finished);
    DmtdDecoder dmtd(
        task, {.horizon = 1 + int(seed % 5), .prompt_rule = kDmtdPromptRules[seed % 3].value});
    const Outcome by_cycles = run(dmtd, task, /*agreeing=*/true, 1 + int(seed % 24));
    CHECK_EQ(by_cycles.tokens, expected.tokens);
    CHECK_EQ(by_cycles.nfe, by_ntp.nfe);
    CHECK(by_cycles.finished == expected.finished);
    complete += expected.finished == FinishReason::complete ? 1 : 0;
    stopped += expected.finished == FinishReason::stop ? 1 : 0;
    fewer += by_ntp.nfe < static_cast<int>(expected.tokens.size()) ? 1 : 0;
  }
  CHECK(complete > 300 && stopped > 300 && fewer > 1000 && branches > 300);
}

TEST(constrained_blocks_are_what_the_grammar_allows) {
  int complete = 0, forwards = 0, tokens = 0;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const std::vector<Tokens> places = random_places(seed);
    const DecodeTask task = random_task(seed, templated(places));
    const bool family = seed % 5 == 0;  // as SDAR and Fast-dLLM v2 have it
    const BlockMethod method{
        .mask_token_id = kMask,
        .block_size = 1 + int(seed % 16),
        .unmask = gamma(seed % 4 == 0 ? 0.1f : kInf),
        .past_eos = seed % 3 == 0,
        .seed_slot = seed % 7 == 0,
        .absolute_blocks = family,
        .prompt_attention = family ? PromptAttention::block_causal : PromptAttention::causal,
        .commit_attention = family ? CommitAttention::block : CommitAttention::causal};
    SetBlockDecoder decoder(task, method);
    const Outcome outcome = run(decoder, task, /*agreeing=*/seed % 2 == 0);
    Template check(places);
    for (std::size_t i = 0; i < outcome.tokens.size(); ++i) {
      const TokenId token = outcome.tokens[i];
      CHECK(contains(check.allowed(), token));
      CHECK_EQ(token == kEos,
               outcome.finished == FinishReason::stop && i + 1 == outcome.tokens.size());
      check.consume(token);
    }
    CHECK_EQ(check.ended(), outcome.finished == FinishReason::complete);
    complete += check.ended() ? 1 : 0;
    forwards += outcome.nfe;
    tokens += static_cast<int>(outcome.tokens.size());
  }
  CHECK(complete > 300 && 2 * forwards < tokens);
}

TEST(constraint_forced_text_takes_no_forward) {
  // 1 2 (3 or 4) 5 6, then an end.
  const auto grammar = templated({{1}, {2}, {3, 4}, {5}, {6}});
  DecodeTask constrained = test::task({9}, 20);
  constrained.rules.grammar = grammar;
  NtpDecoder ntp(constrained);
  CHECK_EQ(text(ntp.plan({})), "[9 1 2 causal commit > 2]");
  CHECK_EQ(absorb(ntp, {row(4)}), "0:1 1:2 2:4 3:5 4:6 | 1 2 4 5 6 | complete");
  constrained.max_tokens = 4;
  NtpDecoder cut(constrained);
  CHECK_EQ(absorb(cut, {row(4)}), "0:1 1:2 2:4 3:5 | 1 2 4 5 | length");
  constrained.max_tokens = 2;  // nothing is left to ask
  NtpDecoder forced(constrained);
  CHECK_EQ(text(forced.plan({})), "[9 1 2 causal commit]");
  CHECK_EQ(absorb(forced, {}), "0:1 1:2 | 1 2 | length");
}

TEST(choices_are_walked_token_by_token) {
  const Choices choices({{4, 5, 6}, {4, 5}, {4, 5, 9, 8}, {4, 5}}, 128, {kEos, 100});
  const auto text = choices.begin();
  CHECK_EQ(text->forced(), (Tokens{4, 5}));
  CHECK(text->allowed() == set_of(Tokens{4}) && !text->ended());
  CHECK(!text->consume(5) && text->consume(4) && text->consume(5));
  CHECK_EQ(text->forced(), Tokens{});  // it may end here
  CHECK(text->allowed() == set_of(Tokens{6, 9, kEos, 100}) && !text->ended());
  CHECK(!text->consume(kEos) && text->consume(9));
  CHECK_EQ(text->forced(), Tokens{8});
  text->roll_back(1);
  CHECK(text->consume(6) && text->ended());
  CHECK_EQ(text->forced(), Tokens{});
  CHECK(!text->consume(4));
  CHECK_THROWS_WITH(Choices({}, 128, {}), "at least one choice");
  CHECK_THROWS_WITH(Choices({{}}, 128, {}), "an empty one");
  CHECK_THROWS_WITH(Choices({{128}}, 128, {}), "token 128 is outside 128 tokens");
}

// Through T where a head is among the tokens, and not where there is none.
TEST(dmtd_forced_text_goes_with_the_row_that_decides) {
  DecodeTask constrained = test::task({9}, 20);
  constrained.rules.grammar =
      templated({{1}, {2, 3}, {4}, {5, 6}, {8}, {9, 1}, {2, 3}, {4}, {5, 6}});
  DmtdDecoder decoder(constrained, {.horizon = 4});
  CHECK_EQ(text(decoder.plan({})), "at 0 [9 1 e+h causal commit > 1]");
  CHECK_EQ(text(decoder.plan({1})), "at 0 [9 e+h causal commit]");
  CHECK_EQ(absorb(decoder, {row(2)}), "0:1 1:2 2:4 | 1 2 4 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 2 [2 4 skip e causal commit > 1]");
  CHECK_EQ(absorb(decoder, {row(6)}), "3:6 4:8 | 6 8 |");
  CHECK_EQ(text(decoder.plan({})),
           "at 2 [2 4 refill causal commit] [6 e causal commit] [8 e+h causal commit > 0]");
  CHECK_EQ(text(decoder.plan({1})), "at 4 [6 skip e causal commit]");
  CHECK_EQ(absorb(decoder, {row(9)}), "5:9 | 9 | thinking");
  CHECK_EQ(text(decoder.plan({})), "at 6 [9 skip e causal commit > 0]");
}

TEST(constraint_is_asked_for_each_row_of_a_draft) {
  ConstrainedText text(*templated({{1, 2}, {3}, {4, 5}, {6, 7}}));
  const Tokens draft = {2, 9, 5};
  const auto [followed, ended] = text.follow(draft);
  CHECK_EQ(followed, (Tokens{2, 3, 5}));  // what is forced is put in its place
  CHECK(!ended);
  CHECK_EQ(text.follow(Tokens{6, 3}).tokens, Tokens{});
  const std::vector<TokenSet> sets = text.allowed(followed);
  CHECK_EQ(sets.size(), 4u);
  CHECK(sets[0] == set_of(Tokens{1, 2}) && sets[1] == set_of(Tokens{3}));
  CHECK(sets[2] == set_of(Tokens{4, 5}) && contains(sets[3], 6));
  CHECK_EQ(text.allowed(Tokens{2, 4, 5}).size(), 2u);  // as far as the draft is allowed
  text.add(2);
  CHECK_EQ(text.forced(), Tokens{3});
  text.add(4);
  CHECK_THROWS_WITH(text.forced(), "token 4 may not follow");
}

}  // namespace
}  // namespace sbd
