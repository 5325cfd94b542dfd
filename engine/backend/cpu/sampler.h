// Draws a token from one row of logits.
#pragma once

#include <span>

#include "backend/cpu/kernels.h"
#include "core/batch.h"

namespace sbd::cpu {

struct Sample {
  TokenId token;
  float probability;  // under the distribution it was drawn from
};

// Temperature (> 0), then top-k, then top-p (the fewest most probable tokens whose probabilities
// reach top_p; ties: the lower id first), then min-p (those at least min_p times as probable as the
// most probable), then Gumbel-max: the token with the highest logit /
// temperature - log(-log(u)), u from a counter keyed by (seed, sample index, position, draw, token
// id). A token is excluded by a logit of kMinusInfinity.
// `scratch` is as long as logits: nothing is allocated here, where worker threads are at work.
Sample sample(const Kernels& kernels, std::span<const float> logits, const Sampling& sampling,
              int position, std::span<TokenId> scratch);

}  // namespace sbd::cpu
