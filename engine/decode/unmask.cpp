#include "decode/unmask.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"

namespace sbd {
namespace {

// The lower, the sooner a position is decided.
float sort_key(Proxy proxy, const RowStats& row) {
  switch (proxy) {
    case Proxy::entropy: return row.entropy;
    case Proxy::confidence: return -row.top_probability;
    case Proxy::margin: return -row.margin;
    case Proxy::position: return 0.0f;  // the sort is stable
  }
  return 0.0f;
}

// Indices in the order of the proxy. A NaN has no place in an order (and a sort that meets one may
// do anything), so it counts as infinite.
std::vector<int> sorted(Proxy proxy, std::span<const RowStats> candidates) {
  std::vector<float> keys;
  for (const RowStats& row : candidates) {
    const float key = sort_key(proxy, row);
    keys.push_back(std::isnan(key) ? std::numeric_limits<float>::infinity() : key);
  }
  std::vector<int> order(candidates.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](int i) { return keys[static_cast<std::size_t>(i)]; });
  return order;
}

// How many of `rows`, in the order of the proxy, a rule decides. Sums and products are in double:
// the values are float, so what is added up is all but exact, and the values alone decide which
// side of the bound a row falls on, not the rounding on the way.

// SBD eq. 18: the largest s with sum_{j<=s} H_j - max_{j<=s} H_j <= gamma. Taking H_s and its
// maximum M in turn, the left side grows by min(H_s, M): sorted by entropy that is H_(s-1), so this
// is eq. 8 too, and gamma = 0 stays exact where a difference of two sums would leave a rounding
// error. No entropy is negative, so the left side never falls: the first s to fail is the end.
int count_entropy_bounded(const std::vector<RowStats>& rows, float gamma) {
  double bound = 0.0;
  float max_entropy = rows[0].entropy;
  int count = 1;
  for (; count < static_cast<int>(rows.size()); ++count) {
    const float entropy = rows[static_cast<std::size_t>(count)].entropy;
    bound += std::min(entropy, max_entropy);
    if (!(bound <= gamma)) {  // a NaN fails
      break;
    }
    max_entropy = std::max(entropy, max_entropy);
  }
  return count;
}

// Fast-dLLM: the largest n with (n + 1)(1 - c_n) < factor. Both terms grow with n, so the n that
// pass are the first ones; taking the last one that passes needs no such argument.
int count_factor(const std::vector<RowStats>& rows, float factor) {
  int count = 1;
  for (int n = 1; n <= static_cast<int>(rows.size()); ++n) {
    const double confidence = rows[static_cast<std::size_t>(n - 1)].top_probability;
    if ((n + 1) * (1.0 - confidence) < factor) {
      count = n;
    }
  }
  return count;
}

int count_confident(const std::vector<RowStats>& rows, float threshold, int least) {
  const auto passes = [&](const RowStats& row) { return row.top_probability > threshold; };
  return std::max(least, static_cast<int>(std::ranges::count_if(rows, passes)));
}

int count_unmasked(const Unmask& unmask, const std::vector<RowStats>& rows) {
  const int top_n = std::min(unmask.top_n, static_cast<int>(rows.size()));
  switch (unmask.rule) {
    case UnmaskRule::entropy_bounded: return count_entropy_bounded(rows, unmask.gamma);
    case UnmaskRule::factor: return count_factor(rows, unmask.factor);
    case UnmaskRule::confidence: return count_confident(rows, unmask.confidence_threshold, top_n);
    case UnmaskRule::top_n: return top_n;
  }
  return 1;
}

}  // namespace

Proxy order(const Unmask& unmask) {
  switch (unmask.rule) {
    case UnmaskRule::entropy_bounded: return unmask.proxy.value_or(Proxy::entropy);
    case UnmaskRule::top_n: return unmask.proxy.value_or(Proxy::confidence);
    case UnmaskRule::factor:
    case UnmaskRule::confidence: break;
  }
  return Proxy::confidence;
}

Unmask bolder(const Unmask& unmask, float times) {
  Unmask other = unmask;
  if (times == 1) return other;
  if (std::isinf(times)) {
    other.rule = UnmaskRule::top_n;
    other.top_n = std::numeric_limits<int>::max();
    return other;
  }
  other.gamma *= times;
  other.factor *= times;
  other.confidence_threshold = 1 - (1 - unmask.confidence_threshold) * times;
  other.top_n = std::max(1, static_cast<int>(static_cast<float>(unmask.top_n) * times));
  return other;
}

std::vector<int> select_unmasked(const Unmask& unmask, std::span<const RowStats> candidates) {
  SBD_CHECK(!candidates.empty(), "expected at least one masked position to choose from, got none");
  std::vector<int> chosen = sorted(order(unmask), candidates);
  std::vector<RowStats> rows;
  for (const int i : chosen) {
    rows.push_back(candidates[static_cast<std::size_t>(i)]);
  }
  chosen.resize(static_cast<std::size_t>(count_unmasked(unmask, rows)));
  std::ranges::sort(chosen);
  return chosen;
}

}  // namespace sbd
