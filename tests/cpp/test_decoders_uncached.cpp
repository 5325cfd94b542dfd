// The decoders on a fake model, whose statistics depend on every token a row sees, against uncached
// decoding: a wrong token, row, order or count in any plan gives another text.
#include <algorithm>
#include <numeric>
#include <vector>

#include "core/random.h"
#include "decode/ntp.h"
#include "decode/set_block.h"
#include "fake_model.h"

namespace sbd {
namespace {

using namespace test;

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
    const int rows = 1 + below(24);
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
    check_same(run(ntp, random, /*agreeing=*/false, rows), uncached_ntp(random));
    SetBlockDecoder sbd(random,
                        {.mask_token_id = kMask, .block_size = block_size, .unmask = unmask});
    const Outcome outcome = run(sbd, random, /*agreeing=*/false, rows);
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
