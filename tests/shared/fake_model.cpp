#include "fake_model.h"

#include <cmath>
#include <map>

#include "core/random.h"

namespace sbd::test {

RowStats fake_row(std::span<const TokenId> visible, int position, const Sampling& sampling) {
  std::uint64_t key = combine(17, static_cast<std::uint64_t>(position));
  for (const TokenId token : visible) {
    key = combine(key, static_cast<std::uint64_t>(token));
  }
  const auto token = [&](std::uint64_t which) {  // 0..29, so that kEos comes now and then
    return static_cast<TokenId>(combine(key, which) % 30);
  };
  RowStats stats = {.argmax = token(0), .entropy = 2.0f * uniform(key, 1) * uniform(key, 2)};
  stats.top_probability = std::exp(-stats.entropy);
  stats.margin = uniform(key, 3);
  const std::uint64_t draw = combine(combine(sampling.seed, sampling.sample_index), sampling.draw);
  stats.sampled = sampling.temperature > 0 ? token(draw) : stats.argmax;
  stats.sampled_probability = sampling.temperature > 0 ? uniform(key, draw) : 1.0f;
  return stats;
}

RowStats agreeing_row(std::span<const TokenId> visible, int position, const Segment& segment) {
  RowStats stats = fake_row(visible, position, {});
  const int place = position + segment.decides;
  const std::uint64_t key = combine(23, static_cast<std::uint64_t>(place));
  if (combine(key, static_cast<std::uint64_t>(stats.argmax)) % 4 != 0) {
    stats.argmax = static_cast<TokenId>(key % 30);
  }
  const std::uint64_t noise = combine(combine(key, segment.sampling.seed), segment.sampling.draw);
  stats.sampled =
      segment.sampling.temperature > 0
          ? static_cast<TokenId>((static_cast<std::uint64_t>(stats.argmax) + noise) % 30)
          : stats.argmax;
  return stats;
}

void follow_rules(const RowAsk& ask, RowStats& stats) {
  if (!ask.rules || ask.rules->allowed.empty()) return;
  const auto next = [&](TokenId token) {
    int steps = 0;
    for (; !sbd::contains(ask.rules->allowed, token); token = (token + 1) % 128)
      CHECK(++steps < 128);
    return token;
  };
  stats.argmax = next(stats.argmax);
  stats.sampled = next(stats.sampled);
}

Outcome run(Decoder& decoder, const DecodeTask& task, bool agreeing, int max_rows,
            ForwardCosts* costs) {
  Outcome outcome;
  Tokens cache;
  std::map<int, TokenId> revealed;  // the newest at each position
  std::size_t reveals = 0;
  bool verifies = false;
  const auto cache_holds_text = [&] {
    Tokens all = task.prompt;
    all.insert(all.end(), outcome.tokens.begin(), outcome.tokens.end());
    return cache.size() <= all.size() && std::equal(cache.begin(), cache.end(), all.begin());
  };
  for (int forward = 0; forward < 1000; ++forward) {
    std::vector<RowStats> stats;
    const std::uint64_t random = combine(29, static_cast<std::uint64_t>(forward));
    const Budget budget{.rows = 1 + static_cast<int>(random % static_cast<std::uint64_t>(max_rows)),
                        .price = {.costs = costs, .others = static_cast<int>(random % 3)}};
    const Demand demand = decoder.demand();
    const Plan plan = decoder.plan(budget);
    if (plan.before_head) plan.before_head();
    CHECK(plan.n_rows() > 0 && plan.n_rows() <= std::max(budget.rows, demand.least_rows));
    CHECK_EQ(decoder.plan({0}).n_rows(), demand.least_rows);
    if (plan.start) {
      CHECK(*plan.start <= static_cast<int>(cache.size()));
      cache.resize(static_cast<std::size_t>(*plan.start));
    }
    CHECK(cache_holds_text());  // and nothing else
    Tokens visible = cache;
    for (const Segment& segment : plan.segments) {
      CHECK(!segment.tokens.empty());
      CHECK(segment.kv == Kv::scratch || visible.size() == cache.size());
      const auto place = static_cast<std::ptrdiff_t>(visible.size());
      visible.insert(visible.end(), segment.tokens.begin(), segment.tokens.end());
      CHECK(visible.size() <= static_cast<std::size_t>(task.n_ctx));
      CHECK(!segment.begin || std::ssize(visible) <= decoder.most_positions());
      outcome.branches += segment.begin ? 1 : 0;
      const std::ptrdiff_t begin = segment.begin.value_or(static_cast<int>(place));
      CHECK(begin == place || (begin < place && segment.kv == Kv::scratch));
      Tokens here = visible;  // the text that its rows stand in
      here.erase(here.begin() + begin, here.begin() + place);
      CHECK(std::ranges::is_sorted(segment.outputs));
      for (const int& output : segment.outputs) {
        const std::size_t position = static_cast<std::size_t>(begin + output);
        const bool causal = segment.attention == Attention::causal;
        const auto seen = std::span(here).first(causal ? position + 1 : here.size());
        const int at = static_cast<int>(position);
        stats.push_back(agreeing ? agreeing_row(seen, at, segment)
                                 : fake_row(seen, at, segment.sampling));
        const std::size_t i = static_cast<std::size_t>(&output - segment.outputs.data());
        if (!segment.asks.empty()) follow_rules(segment.asks[i], stats.back());
      }
      if (segment.kv == Kv::commit) {
        cache = visible;
      }
    }
    if (costs != nullptr) {
      costs->record(plan.n_rows(), 1 + uniform(random, 1) * static_cast<float>(plan.n_rows()) / 8);
    }
    const Events events = decoder.absorb(plan, stats);
    verifies = verifies || events.accepted;
    outcome.nfe += events.revealed.empty() && !events.accepted ? 0 : 1;
    outcome.most_accepted = std::max(outcome.most_accepted, events.accepted.value_or(0));
    for (const Reveal& reveal : events.revealed) {
      CHECK(reveal.position >= 0 && reveal.token != kMask);
      revealed[reveal.position] = reveal.token;
      ++reveals;
    }
    for (const TokenId token : events.committed) {
      const auto found = revealed.find(static_cast<int>(outcome.tokens.size()));
      CHECK(found != revealed.end() && found->second == token);
      outcome.tokens.push_back(token);
    }
    if (events.finished) {
      outcome.finished = *events.finished;
      const bool again = verifies || task.rules.grammar;
      CHECK(again || reveals == revealed.size());  // each position once
      CHECK(verifies || cache_holds_text());  // where not, what is refused comes off with a start
      return outcome;
    }
  }
  CHECK(false);  // it never finished
  return outcome;
}

void check_same(const Outcome& actual, const Outcome& expected) {
  CHECK_EQ(actual.tokens, expected.tokens);
  CHECK_EQ(actual.nfe, expected.nfe);
  CHECK_EQ(actual.finished, expected.finished);
  CHECK(!actual.tokens.empty() && !contains(actual.tokens, kMask));
}

}  // namespace sbd::test
