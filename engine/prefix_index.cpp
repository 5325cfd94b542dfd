#include "prefix_index.h"

#include <algorithm>
#include <compare>
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

void PrefixIndex::remove(std::string_view kind, std::span<const TokenId> tokens, std::int64_t id) {
  const auto entry = entries_.find(View{kind, tokens, id});
  if (entry != entries_.end()) entries_.erase(entry);
}

std::optional<PrefixIndex::Match> PrefixIndex::longest(std::string_view kind,
                                                       std::span<const TokenId> tokens) const {
  std::optional<Match> best;
  const auto consider = [&](const Entry& entry) {
    if (entry.kind != kind) return;
    const int length = agreeing(entry.tokens, tokens);
    if (length > 0 && (!best || length > best->length)) best = {entry.id, length};
  };
  const auto next =
      entries_.lower_bound(View{kind, tokens, std::numeric_limits<std::int64_t>::min()});
  if (next != entries_.end()) consider(*next);
  if (next != entries_.begin()) consider(*std::prev(next));
  return best;
}

bool PrefixIndex::Before::operator()(const View& a, const View& b) const {
  if (a.kind != b.kind) return a.kind < b.kind;
  const auto tokens = std::lexicographical_compare_three_way(a.tokens.begin(), a.tokens.end(),
                                                             b.tokens.begin(), b.tokens.end());
  return tokens != 0 ? tokens < 0 : a.id < b.id;
}

}  // namespace sbd
