// Unmasking rules: which masked positions of a block are decided after a forward.
#pragma once

#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "core/batch.h"
#include "core/names.h"

namespace sbd {

enum class UnmaskRule {
  entropy_bounded,  // EB-Sampler, arXiv 2505.24857; SBD eq. 8, and eq. 18 with a proxy
  factor,           // Fast-dLLM: the largest n with (n + 1)(1 - c_n) < factor
  confidence,       // Fast-dLLM: all with confidence > threshold, but at least top_n (SDAR)
  top_n,            // a fixed number
};

inline constexpr Named<UnmaskRule> kUnmaskRules[] = {
    {"entropy_bounded", UnmaskRule::entropy_bounded},
    {"factor", UnmaskRule::factor},
    {"confidence", UnmaskRule::confidence},
    {"top_n", UnmaskRule::top_n},
};

enum class Proxy { entropy, confidence, margin, position };  // what makes the order, best first

inline constexpr Named<Proxy> kProxies[] = {
    {"entropy", Proxy::entropy},
    {"confidence", Proxy::confidence},
    {"margin", Proxy::margin},
    {"position", Proxy::position},
};

struct Unmask {
  UnmaskRule rule = UnmaskRule::entropy_bounded;
  float gamma = 0.35f;  // nats; infinity: the whole block
  // Of entropy_bounded (unset: entropy) and top_n (unset: confidence); the others go by confidence.
  std::optional<Proxy> proxy = {};
  float factor = 1.0f;
  float confidence_threshold = 0.9f;
  int top_n = 1;
};

// What positions are sorted by.
Proxy order(const Unmask& unmask);

// The same rule, that takes about so many times as much.
Unmask bolder(const Unmask& unmask, float times);

// Indices into `candidates` (statistics of the masked positions, in order of position) of those to
// decide now: at least one, ascending. Ties go to the lower position, a NaN comes last.
std::vector<int> select_unmasked(const Unmask& unmask, std::span<const RowStats> candidates);

}  // namespace sbd
