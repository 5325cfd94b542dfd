// Token sequences by kind, of which the one that begins most like another is found without
// comparing it with all: in their order it stands beside it.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/types.h"

namespace sbd {

class PrefixIndex {
 public:
  struct Entry {
    std::string kind;
    std::vector<TokenId> tokens;
    std::int64_t id;
  };
  struct Match {
    std::int64_t id;
    int length;  // tokens that agree
  };

  void add(std::string kind, std::vector<TokenId> tokens, std::int64_t id);
  // Takes no memory, and so cannot fail.
  void remove(std::string_view kind, std::span<const TokenId> tokens, std::int64_t id);
  // One of those that agree longest; nothing where none begins alike.
  std::optional<Match> longest(std::string_view kind, std::span<const TokenId> tokens) const;

 private:
  struct View {  // of an entry, or of what is looked for, without a copy of it
    std::string_view kind;
    std::span<const TokenId> tokens;
    std::int64_t id;
    View(std::string_view of, std::span<const TokenId> begin, std::int64_t number)
        : kind(of), tokens(begin), id(number) {}
    View(const Entry& entry) : View(entry.kind, entry.tokens, entry.id) {}
  };
  struct Before {
    using is_transparent = void;
    bool operator()(const View& a, const View& b) const;
  };

  std::set<Entry, Before> entries_;
};

}  // namespace sbd
