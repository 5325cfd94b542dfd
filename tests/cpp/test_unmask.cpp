// Unmasking rules: hand-worked examples, and random statistics against the definitions in
// brute force.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "core/random.h"
#include "decode/unmask.h"
#include "scripted.h"

namespace sbd {
namespace {

using namespace test;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Rows = std::vector<RowStats>;
using Indices = std::vector<int>;

Rows entropies(const std::vector<float>& values) {
  Rows rows;
  for (const float value : values) {
    rows.push_back({.entropy = value});
  }
  return rows;
}

Rows confidences(const std::vector<float>& values) {
  Rows rows;
  for (const float value : values) {
    rows.push_back({.top_probability = value});
  }
  return rows;
}

Unmask entropy_bounded(float gamma, Proxy proxy = Proxy::entropy) {
  return {.rule = UnmaskRule::entropy_bounded, .gamma = gamma, .proxy = proxy};
}

Unmask factor(float value) { return {.rule = UnmaskRule::factor, .factor = value}; }

TEST(unmask_entropy_bounded_by_hand) {
  // Ascending: 0.125 (position 2), 0.25 (0), 0.5 (3), 1.0 (1). Sums before the last element:
  // s = 1: 0, s = 2: 0.125, s = 3: 0.375, s = 4: 0.875.
  const Rows rows = entropies({0.25f, 1.0f, 0.125f, 0.5f});
  CHECK_EQ(select_unmasked(entropy_bounded(0.0f), rows), (Indices{2}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.124f), rows), (Indices{2}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.125f), rows), (Indices{0, 2}));  // <=, not <
  CHECK_EQ(select_unmasked(entropy_bounded(0.374f), rows), (Indices{0, 2}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.375f), rows), (Indices{0, 2, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.874f), rows), (Indices{0, 2, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.875f), rows), (Indices{0, 1, 2, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(kInf), rows), (Indices{0, 1, 2, 3}));
}

TEST(unmask_ties_go_to_the_lower_position) {
  const Rows rows = entropies({2.0f, 0.5f, 0.5f, 0.5f});
  CHECK_EQ(select_unmasked(entropy_bounded(0.0f), rows), (Indices{1}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.5f), rows), (Indices{1, 2}));  // sums 0, 0.5, 1
  CHECK_EQ(select_unmasked(top_n(2), confidences({0.1f, 0.3f, 0.3f, 0.3f})), (Indices{1, 2}));
  // Enough equal keys that a sort which is not stable would mix them.
  CHECK_EQ(select_unmasked(top_n(3), confidences(std::vector<float>(200, 0.5f))),
           (Indices{0, 1, 2}));
}

TEST(unmask_gamma_zero_takes_one_and_those_behind_exact_zeros) {
  CHECK_EQ(select_unmasked(entropy_bounded(0.0f), entropies({0.7f, 0.6f, 0.9f})), (Indices{1}));
  // Sums before the last: 0, 0, 0, 1e-20: the zeros, and the first position behind them.
  CHECK_EQ(select_unmasked(entropy_bounded(0.0f), entropies({0.3f, 0.0f, 1e-20f, 0.0f})),
           (Indices{1, 2, 3}));
  // Cumsum minus max would take all three: 1e-20 drowns in the sum, in double too.
  const Rows rows = entropies({0.7f, 1e-20f, 0.7f});
  CHECK_EQ(select_unmasked(entropy_bounded(0.0f), rows), (Indices{1}));
  CHECK_EQ(select_unmasked(entropy_bounded(1e-20f), rows), (Indices{0, 1}));
}

TEST(unmask_sums_do_not_round) {
  // s = 64 is decided by 63 * 0.1f, which a double holds exactly and a float sum misses.
  const Rows rows = entropies(std::vector<float>(65, 0.1f));
  const double sum = 63 * static_cast<double>(0.1f);
  const float above = std::nextafter(static_cast<float>(sum), kInf);
  const float below = std::nextafter(static_cast<float>(sum), 0.0f);
  CHECK_EQ(select_unmasked(entropy_bounded(above), rows).size(), 64);
  CHECK_EQ(select_unmasked(entropy_bounded(below), rows).size(), 63);
}

TEST(unmask_proxies_by_hand) {
  // position          0      1      2      3
  // entropy           0.5    0.25   1.0    0.125
  // top probability   0.8    0.5    0.9    0.6
  // margin            0.3    0.2    0.4    0.5
  const Rows rows = {{.top_probability = 0.8f, .margin = 0.3f, .entropy = 0.5f},
                     {.top_probability = 0.5f, .margin = 0.2f, .entropy = 0.25f},
                     {.top_probability = 0.9f, .margin = 0.4f, .entropy = 1.0f},
                     {.top_probability = 0.6f, .margin = 0.5f, .entropy = 0.125f}};
  // confidence: 2, 0, 3, 1 with H = 1, 0.5, 0.125, 0.25. Sums less their maximum:
  // 0, 1.5 - 1 = 0.5, 1.625 - 1 = 0.625, 1.875 - 1 = 0.875.
  CHECK_EQ(select_unmasked(entropy_bounded(0.49f, Proxy::confidence), rows), (Indices{2}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.5f, Proxy::confidence), rows), (Indices{0, 2}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.625f, Proxy::confidence), rows), (Indices{0, 2, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.874f, Proxy::confidence), rows), (Indices{0, 2, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.875f, Proxy::confidence), rows),
           (Indices{0, 1, 2, 3}));
  // margin: 3, 2, 0, 1 with H = 0.125, 1, 0.5, 0.25. Sums less their maximum:
  // 0, 1.125 - 1 = 0.125, 1.625 - 1 = 0.625, 1.875 - 1 = 0.875.
  CHECK_EQ(select_unmasked(entropy_bounded(0.0f, Proxy::margin), rows), (Indices{3}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.125f, Proxy::margin), rows), (Indices{2, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(0.625f, Proxy::margin), rows), (Indices{0, 2, 3}));
  // entropy: 3, 1, 0, 2. Sums before the last: 0, 0.125, 0.375, 0.875.
  CHECK_EQ(select_unmasked(entropy_bounded(0.375f, Proxy::entropy), rows), (Indices{0, 1, 3}));
}

TEST(unmask_factor_by_hand) {
  // Descending: 0.96875, 0.875, 0.75, 0.5. (n + 1)(1 - c_n): 2 * 0.03125 = 0.0625,
  // 3 * 0.125 = 0.375, 4 * 0.25 = 1, 5 * 0.5 = 2.5.
  const Rows rows = confidences({0.75f, 0.96875f, 0.5f, 0.875f});
  CHECK_EQ(select_unmasked(factor(0.01f), rows), (Indices{1}));   // at least one
  CHECK_EQ(select_unmasked(factor(0.375f), rows), (Indices{1}));  // <, not <=
  CHECK_EQ(select_unmasked(factor(0.376f), rows), (Indices{1, 3}));
  CHECK_EQ(select_unmasked(factor(1.0f), rows), (Indices{1, 3}));
  CHECK_EQ(select_unmasked(factor(1.01f), rows), (Indices{0, 1, 3}));
  CHECK_EQ(select_unmasked(factor(2.51f), rows), (Indices{0, 1, 2, 3}));
}

TEST(unmask_confidence_by_hand) {
  const Rows rows = confidences({0.5f, 0.95f, 0.9f, 0.91f, 0.95f});
  CHECK_EQ(select_unmasked(confidence(0.9f), rows), (Indices{1, 3, 4}));  // >, not >=
  CHECK_EQ(select_unmasked(confidence(0.91f), rows), (Indices{1, 4}));
  CHECK_EQ(select_unmasked(confidence(0.0f), rows), (Indices{0, 1, 2, 3, 4}));
  CHECK_EQ(select_unmasked(confidence(1.0f), rows), (Indices{1}));  // none passes: the best
}

TEST(unmask_top_n_by_hand) {
  const Rows rows = confidences({0.5f, 0.2f, 0.9f, 0.6f});
  CHECK_EQ(select_unmasked(top_n(1), rows), (Indices{2}));
  CHECK_EQ(select_unmasked(top_n(3), rows), (Indices{0, 2, 3}));
  CHECK_EQ(select_unmasked(top_n(9), rows), (Indices{0, 1, 2, 3}));
}

TEST(unmask_puts_nan_last_and_ends) {
  const Rows rows = entropies({kNan, 0.5f, kNan, 0.25f});
  CHECK_EQ(select_unmasked(entropy_bounded(kInf), rows), (Indices{1, 3}));
  CHECK_EQ(select_unmasked(entropy_bounded(kInf), entropies({kNan, kNan})), (Indices{0}));
  CHECK_EQ(select_unmasked(confidence(0.5f), confidences({kNan, 0.6f, kNan})), (Indices{1}));
  CHECK_EQ(select_unmasked(factor(kInf), confidences({kNan, 0.6f, 0.9f})), (Indices{1, 2}));
  CHECK_EQ(select_unmasked(top_n(1), confidences({kNan, 0.6f, kNan})), (Indices{1}));
}

// The definitions, without sorting: position i comes before j where its key is lower, or equal and
// i < j; the set of the first s is what `rank` says. Every s is tried.
struct BruteForce {
  const Unmask& unmask;
  const Rows& rows;

  double key(std::size_t i) const {
    Proxy proxy = Proxy::confidence;
    if (unmask.rule == UnmaskRule::entropy_bounded) proxy = unmask.proxy.value_or(Proxy::entropy);
    if (unmask.rule == UnmaskRule::top_n) proxy = unmask.proxy.value_or(Proxy::confidence);
    if (proxy == Proxy::entropy) return rows[i].entropy;
    if (proxy == Proxy::margin) return -rows[i].margin;
    return proxy == Proxy::position ? static_cast<double>(i) : -rows[i].top_probability;
  }

  int rank(std::size_t i) const {
    int before = 0;
    for (std::size_t j = 0; j < rows.size(); ++j) {
      before += key(j) < key(i) || (key(j) == key(i) && j < i) ? 1 : 0;
    }
    return before;
  }

  Indices first(int s) const {
    Indices set;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (rank(i) < s) {
        set.push_back(static_cast<int>(i));
      }
    }
    return set;
  }

  // Whether the first s may be decided together. The statistics are multiples of 2^-10, so that
  // every sum here is exact and eq. 18 can be taken as it is printed.
  bool allows(int s) const {
    double sum = 0, largest = 0, last_confidence = kInf;
    for (const int i : first(s)) {
      const RowStats& row = rows[static_cast<std::size_t>(i)];
      sum += row.entropy;
      largest = std::max(largest, static_cast<double>(row.entropy));
      last_confidence = std::min(last_confidence, static_cast<double>(row.top_probability));
    }
    switch (unmask.rule) {
      case UnmaskRule::entropy_bounded: return sum - largest <= unmask.gamma;
      case UnmaskRule::factor: return (s + 1) * (1 - last_confidence) < unmask.factor;
      case UnmaskRule::confidence:
        return s <= unmask.top_n || last_confidence > unmask.confidence_threshold;
      case UnmaskRule::top_n: return s <= unmask.top_n;
    }
    return false;
  }

  Indices select() const {
    int best = 1;
    for (int s = 1; s <= static_cast<int>(rows.size()); ++s) {
      best = allows(s) ? s : best;
    }
    return first(best);
  }
};

TEST(unmask_equals_the_definitions_on_random_statistics) {
  std::uint64_t drawn = 0;
  const auto below = [&](int bound) {
    return static_cast<int>(mix64(0x5bd1e995u + ++drawn) % static_cast<std::uint64_t>(bound));
  };
  const auto fraction = [&](int steps) {  // few steps make ties
    return static_cast<float>(below(steps + 1)) / static_cast<float>(steps);
  };
  const float gammas[] = {0.0f, 0.125f, 0.35f, 1.5f, kInf};
  const float factors[] = {0.25f, 1.0f, 3.0f};
  int proper_subsets = 0;
  for (int round = 0; round < 4000; ++round) {
    const int steps = below(2) == 0 ? 4 : 1024;
    const float spread = below(2) == 0 ? 0.25f : 2.0f;
    Rows rows(static_cast<std::size_t>(1 + below(20)));
    for (RowStats& row : rows) {
      row.entropy = spread * fraction(steps);
      row.top_probability = 1.0f - fraction(steps) * (spread / 2.0f);
      row.margin = fraction(steps);
    }
    Unmask unmask;
    unmask.rule = static_cast<UnmaskRule>(round % 4);
    if (const int proxy = below(5); proxy < 4) unmask.proxy = static_cast<Proxy>(proxy);
    unmask.gamma = gammas[below(5)];
    unmask.factor = factors[below(3)];
    unmask.confidence_threshold = fraction(4);
    unmask.top_n = 1 + below(8);
    const Indices expected = BruteForce{unmask, rows}.select();
    CHECK_EQ(select_unmasked(unmask, rows), expected);
    proper_subsets += expected.size() > 1 && expected.size() < rows.size() ? 1 : 0;
  }
  CHECK(proper_subsets > 1000);  // the draw is worth something
}

TEST(unmask_gamma_zero_equals_the_single_best_on_random_entropies) {
  for (std::uint64_t round = 0; round < 1000; ++round) {
    std::vector<float> values;
    for (std::uint64_t i = 0; i < 16; ++i) {
      values.push_back(-std::log(uniform(round, i)));
    }
    const auto lowest = std::ranges::min_element(values) - values.begin();
    const Rows rows = entropies(values);
    CHECK_EQ(select_unmasked(entropy_bounded(0.0f), rows), (Indices{static_cast<int>(lowest)}));
    CHECK_EQ(select_unmasked(entropy_bounded(kInf), rows).size(), 16);
  }
}

TEST(unmask_names) {
  const auto rule = [](const char* name) { return find_named(kUnmaskRules, "unmask", name); };
  const auto proxy = [](const char* name) { return find_named(kProxies, "proxy", name); };
  CHECK_EQ(rule("entropy_bounded"), UnmaskRule::entropy_bounded);
  CHECK_EQ(rule("factor"), UnmaskRule::factor);
  CHECK_EQ(rule("confidence"), UnmaskRule::confidence);
  CHECK_EQ(rule("top_n"), UnmaskRule::top_n);
  CHECK_EQ(proxy("entropy"), Proxy::entropy);
  CHECK_EQ(proxy("confidence"), Proxy::confidence);
  CHECK_EQ(proxy("margin"), Proxy::margin);
  CHECK_EQ(proxy("position"), Proxy::position);
  CHECK_EQ(name_of(kUnmaskRules, UnmaskRule::factor), "factor");
  CHECK_EQ(name_of(kProxies, Proxy::position), "position");
  CHECK_THROWS_WITH(rule("entropy"),
                    "unknown `unmask` \"entropy\": expected one of entropy_bounded, factor, "
                    "confidence, top_n");
  CHECK_THROWS_WITH(proxy(""),
                    "unknown `proxy` \"\": expected one of entropy, confidence, margin, position");
}

TEST(unmask_needs_candidates) {
  CHECK_THROWS_WITH(select_unmasked({}, {}), "at least one masked position");
}

}  // namespace
}  // namespace sbd
