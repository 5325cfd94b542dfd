// Tables of names a user may choose from: the value of a name, or an error that lists the names.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "core/error.h"

namespace sbd {

template <typename Value>
struct Named {
  std::string_view name;
  Value value;
};

// `option` is what the user calls the choice, such as "unmask".
template <typename Value, std::size_t size>
const Value& find_named(const Named<Value> (&table)[size], std::string_view option,
                        const std::string& wanted) {
  std::string names;
  for (const Named<Value>& entry : table) {
    if (entry.name == wanted) {
      return entry.value;
    }
    names += names.empty() ? "" : ", ";
    names += entry.name;
  }
  fail(ErrorKind::value, "unknown {} \"{}\": expected one of {}", option, wanted, names);
}

}  // namespace sbd
