// What the forward is tested with on every backend: tokens, segments, tiny models of each kind.
#pragma once

#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/batch.h"
#include "tiny_transformer.h"

namespace sbd::test {

inline Tokens random_tokens(int n, std::uint64_t seed) {
  Random random(seed);
  Tokens tokens(static_cast<std::size_t>(n));
  for (TokenId& token : tokens) token = random.below(kVocab);
  return tokens;
}

// A segment whose rows are all wanted.
inline Segment segment(Tokens tokens, Attention attention = Attention::causal, Kv kv = Kv::commit) {
  Segment result{std::move(tokens), attention, kv, {}, {}};
  result.outputs.resize(result.tokens.size());
  std::iota(result.outputs.begin(), result.outputs.end(), 0);
  return result;
}

inline Tokens slice(const Tokens& tokens, int begin, int end) {
  return {tokens.begin() + begin, tokens.begin() + end};
}

// Root mean square of the differences over that of the expected values; NaN where any is NaN.
inline double relative_error(const std::vector<float>& actual, const Matrix& expected) {
  if (actual.size() != expected.size()) return NAN;
  double difference = 0;
  double size = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / size);
}

struct Variant {
  std::string architecture;
  bool tied;
  bool rope_freqs;
  bool more_biases;
  double rope_linear_factor;
};

inline const Variant kVariants[] = {{"llama", false, true, false, 1},
                                    {"llama", true, false, true, 2.5},
                                    {"qwen2", false, false, false, 1},
                                    {"qwen3", true, false, false, 1}};

}  // namespace sbd::test
