// Tables of names a user or a model file may choose from: the value of a name, or an error that
// lists the names.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <ranges>
#include <string>
#include <string_view>

#include "core/error.h"

namespace sbd {

template <typename Value>
struct Named {
  std::string_view name;
  Value value;
};

template <typename Value, std::size_t size>
auto names_of(const Named<Value> (&table)[size]) {
  return table | std::views::transform(&Named<Value>::name);
}

template <typename Value, std::size_t size>
std::string_view name_of(const Named<Value> (&table)[size], Value value) {
  return std::ranges::find(table, value, &Named<Value>::value)->name;
}

// `option` is what the user calls the choice, such as "unmask".
template <typename Value, std::size_t size>
const Value& find_named(const Named<Value> (&table)[size], std::string_view option,
                        const std::string& wanted) {
  const auto found = std::ranges::find(table, wanted, &Named<Value>::name);
  SBD_CHECK(found != std::end(table), "unknown `{}` \"{}\": expected one of {}", option, wanted,
            joined(names_of(table)));
  return found->value;
}

}  // namespace sbd
