// Token sequences by kind, of which the one that begins most like another is found without
// comparing it with all: in their order it stands beside it.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "core/types.h"

namespace sbd {

class PrefixIndex {
 public:
  struct Entry {
    std::string kind;
    std::vector<TokenId> tokens;
    std::int64_t id;
    auto operator<=>(const Entry&) const = default;
  };
  struct Match {
    std::int64_t id;
    int length;  // tokens that agree
  };

  void add(std::string kind, std::vector<TokenId> tokens, std::int64_t id);
  void remove(const std::string& kind, std::span<const TokenId> tokens, std::int64_t id);
  // One of those that agree longest; nothing where none begins alike.
  std::optional<Match> longest(const std::string& kind, std::span<const TokenId> tokens) const;

 private:
  std::set<Entry> entries_;
};

}  // namespace sbd
