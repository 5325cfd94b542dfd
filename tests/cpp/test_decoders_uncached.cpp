// The decoders on a fake model, whose statistics depend on every token a row sees, against uncached
// decoding: a wrong token, row, order or count in any plan gives another text.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "core/random.h"
#include "decode/ntp.h"
#include "decode/set_block.h"

namespace sbd {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr TokenId kMask = 99;
constexpr TokenId kEos = 7;
using Tokens = std::vector<TokenId>;

// Stands for a model: statistics that are a pure function of all tokens a row sees and of its
// position. Entropies are spread so that every rule has something to choose.
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
  return stats;
}

struct Outcome {
  Tokens tokens;
  int nfe = 0;
  FinishReason finished = FinishReason::length;
};

bool contains(const Tokens& tokens, TokenId token) {
  return std::ranges::find(tokens, token) != tokens.end();
}

// Runs a decoder on the fake model behind a KV cache, and holds it to what a plan promises.
Outcome run(Decoder& decoder, const DecodeTask& task) {
  Outcome outcome;
  Tokens cache;
  std::vector<int> revealed;
  for (int forward = 0; forward < 1000; ++forward) {
    std::vector<RowStats> stats;
    Tokens visible = cache;
    for (const Segment& segment : decoder.plan().segments) {
      CHECK(!segment.tokens.empty());
      CHECK(segment.kv == Kv::scratch || visible.size() == cache.size());
      const std::size_t begin = visible.size();
      visible.insert(visible.end(), segment.tokens.begin(), segment.tokens.end());
      CHECK(visible.size() <= static_cast<std::size_t>(task.n_ctx));
      CHECK(std::ranges::is_sorted(segment.outputs));
      for (const int output : segment.outputs) {
        const std::size_t position = begin + static_cast<std::size_t>(output);
        const std::size_t seen =
            segment.attention == Attention::causal ? position + 1 : visible.size();
        stats.push_back(
            fake_row(std::span(visible).first(seen), static_cast<int>(position), segment.sampling));
      }
      if (segment.kv == Kv::commit) {
        cache = visible;
      }
    }
    const Events events = decoder.absorb(stats);
    outcome.nfe += events.revealed.empty() ? 0 : 1;
    CHECK_EQ(stats.empty(), events.revealed.empty());  // rows are wanted to decide something
    for (const Reveal& reveal : events.revealed) {
      CHECK(reveal.token != kMask);
      revealed.push_back(reveal.position);
    }
    outcome.tokens.insert(outcome.tokens.end(), events.committed.begin(), events.committed.end());
    if (events.finished) {
      outcome.finished = *events.finished;
      std::ranges::sort(revealed);
      CHECK(std::ranges::adjacent_find(revealed) == revealed.end());  // each position once
      CHECK(revealed.size() >= outcome.tokens.size());
      // The cache holds the text and nothing else.
      Tokens all = task.prompt;
      all.insert(all.end(), outcome.tokens.begin(), outcome.tokens.end());
      CHECK(cache.size() <= all.size() && std::equal(cache.begin(), cache.end(), all.begin()));
      return outcome;
    }
  }
  CHECK(false);  // it never finished
  return outcome;
}

// methods.md's loop, without a cache: every forward sees the whole text.
Outcome uncached_ntp(const DecodeTask& task) {
  Outcome outcome;
  Tokens all = task.prompt;
  while (static_cast<int>(all.size()) < task.n_ctx &&
         static_cast<int>(outcome.tokens.size()) < task.max_tokens) {
    const RowStats stats = fake_row(all, static_cast<int>(all.size()) - 1, task.sampling);
    const TokenId token = task.sampling.temperature > 0 ? stats.sampled : stats.argmax;
    all.push_back(token);
    outcome.tokens.push_back(token);
    ++outcome.nfe;
    if (contains(task.eos_token_ids, token)) {
      outcome.finished = FinishReason::stop;
      break;
    }
  }
  return outcome;
}

Outcome uncached_sbd(const DecodeTask& task, int block_size, const Unmask& unmask) {
  Outcome outcome;
  Tokens all = task.prompt;
  const int limit = std::min(task.n_ctx, static_cast<int>(task.prompt.size()) + task.max_tokens);
  while (static_cast<int>(all.size()) < limit) {
    const int begin = static_cast<int>(all.size());
    all.resize(static_cast<std::size_t>(std::min(begin + block_size, task.n_ctx)), kMask);
    int end = std::min(static_cast<int>(all.size()), limit);  // in positions of `all`
    bool stopped = false;
    Sampling sampling = task.sampling;
    for (;; ++sampling.draw) {
      std::vector<std::size_t> masked;
      std::vector<RowStats> stats;
      for (int position = begin; position < end; ++position) {
        if (all[static_cast<std::size_t>(position)] == kMask) {
          masked.push_back(static_cast<std::size_t>(position));
          stats.push_back(fake_row(all, position, sampling));
        }
      }
      if (masked.empty()) {
        break;
      }
      ++outcome.nfe;
      for (const int i : select_unmasked(unmask, stats)) {
        const std::size_t position = masked[static_cast<std::size_t>(i)];
        const RowStats& chosen = stats[static_cast<std::size_t>(i)];
        all[position] = sampling.temperature > 0 ? chosen.sampled : chosen.argmax;
        if (contains(task.eos_token_ids, all[position])) {
          end = std::min(end, static_cast<int>(position) + 1);
          stopped = true;
        }
      }
    }
    all.resize(static_cast<std::size_t>(end));
    if (stopped) {
      outcome.finished = FinishReason::stop;
      break;
    }
  }
  outcome.tokens.assign(all.begin() + static_cast<std::ptrdiff_t>(task.prompt.size()), all.end());
  return outcome;
}

void check_same(const Outcome& actual, const Outcome& expected) {
  CHECK_EQ(actual.tokens, expected.tokens);
  CHECK_EQ(actual.nfe, expected.nfe);
  CHECK_EQ(actual.finished, expected.finished);
  CHECK(!actual.tokens.empty() && !contains(actual.tokens, kMask));
}

TEST(decoders_equal_uncached_decoding_on_random_tasks) {
  std::uint64_t drawn = 0;
  const auto below = [&](int bound) {
    return static_cast<int>(mix64(0x2545f491u + ++drawn) % static_cast<std::uint64_t>(bound));
  };
  const float gammas[] = {0.0f, 0.1f, 0.35f, 1.5f, kInf};
  int stopped = 0, filled = 0, parallel = 0;
  for (int round = 0; round < 3000; ++round) {
    DecodeTask random;
    random.prompt.resize(static_cast<std::size_t>(1 + below(20)));
    std::iota(random.prompt.begin(), random.prompt.end(), below(10));
    random.max_tokens = 1 + below(40);
    random.n_ctx = static_cast<int>(random.prompt.size()) + 1 + below(50);
    random.prefill_rows = 1 + below(24);
    if (below(2) == 0) {
      random.eos_token_ids = {kEos};
    }
    if (below(2) == 0) {
      random.sampling = {.temperature = 1.0f,
                         .seed = static_cast<std::uint64_t>(round),
                         .sample_index = static_cast<std::uint64_t>(below(3))};
    }
    Unmask unmask;
    unmask.rule = below(2) == 0 ? UnmaskRule::entropy_bounded : static_cast<UnmaskRule>(below(4));
    unmask.proxy = static_cast<Proxy>(below(3));
    unmask.gamma = gammas[below(5)];
    unmask.confidence_threshold = 0.5f;
    unmask.top_n = 1 + below(4);
    const int block_size = 1 + below(std::min(random.n_ctx, 17));

    NtpDecoder ntp(random);
    check_same(run(ntp, random), uncached_ntp(random));
    SetBlockDecoder sbd(
        random, {.mask_token_id = kMask, .block_size = block_size, .unmask = unmask});
    const Outcome outcome = run(sbd, random);
    check_same(outcome, uncached_sbd(random, block_size, unmask));

    const int tokens = static_cast<int>(outcome.tokens.size());
    stopped += outcome.finished == FinishReason::stop ? 1 : 0;
    filled += tokens + static_cast<int>(random.prompt.size()) == random.n_ctx ? 1 : 0;
    parallel += outcome.nfe < tokens ? 1 : 0;
    if (outcome.finished == FinishReason::length) {
      const int room = random.n_ctx - static_cast<int>(random.prompt.size());
      CHECK_EQ(tokens, random.max_tokens < room ? random.max_tokens : room);
      const bool by_gamma = unmask.rule == UnmaskRule::entropy_bounded;
      if (block_size == 1 || (by_gamma && unmask.gamma == 0.0f)) {
        CHECK_EQ(outcome.nfe, tokens);
      } else if (by_gamma && unmask.gamma == kInf) {
        CHECK_EQ(outcome.nfe, (tokens + block_size - 1) / block_size);
      }
    }
  }
  CHECK(stopped > 300 && filled > 300 && parallel > 1000);  // the draw is worth something
}

}  // namespace
}  // namespace sbd
