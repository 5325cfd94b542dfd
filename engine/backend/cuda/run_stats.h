// Softmax statistics of a run of consecutive logits.
#pragma once

#include "backend/cuda/head.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

inline constexpr float kExcluded = -1e30f;  // the logit of a token that cannot be: finite

inline constexpr Top kNoTop{kExcluded, kExcluded, 0x7fffffff};

// Less probable; of equals the higher id.
__device__ inline bool is_behind(const Top& a, const Top& b) {
  return a.max < b.max || (a.max == b.max && a.argmax > b.argmax);
}

// Chooses values, not structs, which would go through local memory.
__device__ inline Top better(const Top& a, const Top& b) {
  const bool b_wins = is_behind(a, b);
  const float loser = b_wins ? a.max : b.max;
  return {b_wins ? b.max : a.max, fmaxf(b_wins ? b.second : a.second, loser),
          b_wins ? b.argmax : a.argmax};
}

__device__ inline Top warp_top(Top top) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    top = better(top, {__shfl_xor_sync(kAllLanes, top.max, step),
                       __shfl_xor_sync(kAllLanes, top.second, step),
                       __shfl_xor_sync(kAllLanes, top.argmax, step)});
  }
  return top;
}

// A warp: of kLogits logits, of which those of ids from first_id to vocab - 1 count.
template <int kLogits>
__device__ RunStats run_stats(const float* logits, int first_id, int vocab, int mask_token) {
  float mine[kLogits / kWarp];
  Top top = kNoTop;
  float not_finite = 0;
#pragma unroll
  for (int i = 0; i < kLogits / kWarp; ++i) {
    const int at = i * kWarp + static_cast<int>(threadIdx.x) % kWarp, id = first_id + at;
    const bool counts = id < vocab && id != mask_token;
    mine[i] = counts ? logits[at] : kExcluded;
    if (!isfinite(mine[i])) not_finite = 1;
    if (counts) top = better(top, {mine[i], kExcluded, id});
  }
  top = warp_top(top);
  float sum = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < kLogits / kWarp; ++i) {
    const float below = mine[i] - top.max;
    const float e = expf(below);
    sum += e;
    weighted += below * e;
  }
  return {top, warp_sum(sum), warp_sum(weighted), warp_max(not_finite) > 0};
}

}  // namespace sbd::cuda
