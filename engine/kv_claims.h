// Room for caches that grow: who has how much of the budget, and how much more he may come to need.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace sbd {

struct Claim {
  std::size_t held;  // bytes
  std::size_t most;  // that he may come to need, held ones among them
};

// Whether all can get what they may come to need, one after another, as each that has ended gives
// back what it held (Dijkstra's banker). Who needs least goes first: no other order does better.
inline bool all_can_end(std::vector<Claim> claims, std::size_t budget) {
  std::size_t held = 0;
  for (const Claim& claim : claims) held += claim.held;
  if (held > budget) return false;
  std::size_t free = budget - held;
  std::ranges::sort(claims, {}, [](const Claim& claim) { return claim.most - claim.held; });
  return std::ranges::all_of(claims, [&](const Claim& claim) {
    if (claim.most - claim.held > free) return false;
    free += claim.held;
    return true;
  });
}

}  // namespace sbd
