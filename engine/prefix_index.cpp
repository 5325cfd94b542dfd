#include "prefix_index.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace sbd {
namespace {

int agreeing(std::span<const TokenId> a, std::span<const TokenId> b) {
  return static_cast<int>(std::ranges::mismatch(a, b).in1 - a.begin());
}

}  // namespace

void PrefixIndex::add(std::string kind, std::vector<TokenId> tokens, std::int64_t id) {
  entries_.insert({std::move(kind), std::move(tokens), id});
}

void PrefixIndex::remove(const std::string& kind, std::span<const TokenId> tokens,
                         std::int64_t id) {
  entries_.erase({kind, {tokens.begin(), tokens.end()}, id});
}

std::optional<PrefixIndex::Match> PrefixIndex::longest(const std::string& kind,
                                                       std::span<const TokenId> tokens) const {
  std::optional<Match> best;
  const auto consider = [&](const Entry& entry) {
    if (entry.kind != kind) return;
    const int length = agreeing(entry.tokens, tokens);
    if (length > 0 && (!best || length > best->length)) best = {entry.id, length};
  };
  const auto next = entries_.lower_bound(
      {kind, {tokens.begin(), tokens.end()}, std::numeric_limits<std::int64_t>::min()});
  if (next != entries_.end()) consider(*next);
  if (next != entries_.begin()) consider(*std::prev(next));
  return best;
}

}  // namespace sbd
