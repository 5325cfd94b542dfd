// Reads keys that share a prefix, each with the value that a missing one stands for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "core/names.h"
#include "format/metadata.h"
#include "format/text.h"

namespace sbd {

class KeyReader {
 public:
  KeyReader(const Metadata& metadata, std::string prefix)
      : metadata_(metadata), prefix_(std::move(prefix)) {}

  const Metadata& metadata() const { return metadata_; }
  std::string key(std::string_view name) const { return prefix_ + std::string(name); }
  bool has(std::string_view name) const { return metadata_.contains(key(name)); }

  int integer(std::string_view name, int low, int high) const {
    return static_cast<int>(metadata_.integer(key(name), low, high));
  }
  int integer(std::string_view name, int low, int high, int missing) const {
    return has(name) ? integer(name, low, high) : missing;
  }
  double number(std::string_view name, double missing) const {
    return has(name) ? metadata_.number(key(name)) : missing;
  }
  std::string string(std::string_view name, std::string_view missing) const {
    return has(name) ? metadata_.string(key(name)) : std::string(missing);
  }
  bool boolean(std::string_view name, bool missing) const {
    return has(name) ? metadata_.boolean(key(name)) : missing;
  }

  template <typename Value, std::size_t size>
  Value named(std::string_view name, const Named<Value> (&table)[size], Value missing) const {
    if (!has(name)) return missing;
    const std::string& value = metadata_.string(key(name));
    check_one_of(value, name, names_of(table));
    return find_named(table, name, value);
  }

  template <typename Actual, typename Expected>
  void check(bool condition, std::string_view name, const Actual& actual, const Expected& expected,
             std::string_view mend = "convert the checkpoint again") const {
    SBD_CHECK(condition, "{}: key '{}' is {}, expected {}; {}", metadata_.source(), key(name),
              actual, expected, mend);
  }

  template <typename Names>
  void check_one_of(const std::string& value, std::string_view name, const Names& names) const {
    const bool known = std::ranges::find(names, std::string_view(value)) != std::ranges::end(names);
    check(known, name, quote(value), "one of: " + joined(names));
  }

 private:
  const Metadata& metadata_;
  std::string prefix_;
};

}  // namespace sbd
