#include "format/metadata.h"

#include <cstddef>

#include "core/error.h"
#include "format/text.h"

namespace sbd {
namespace {

std::string describe(const MetadataValue& value) {
  struct {
    std::string operator()(bool v) const { return v ? "the boolean true" : "the boolean false"; }
    std::string operator()(std::int64_t v) const { return format("the integer {}", v); }
    std::string operator()(double v) const { return format("the float {}", v); }
    std::string operator()(const std::string& v) const { return "the string " + quote(v); }
    std::string operator()(const std::vector<bool>& v) const { return array(v.size(), "booleans"); }
    std::string operator()(const std::vector<std::int64_t>& v) const {
      return array(v.size(), "integers");
    }
    std::string operator()(const std::vector<double>& v) const { return array(v.size(), "floats"); }
    std::string operator()(const std::vector<std::string>& v) const {
      return array(v.size(), "strings");
    }
    static std::string array(std::size_t length, std::string_view elements) {
      return format("an array of {} {}", length, elements);
    }
  } describer;
  return std::visit(describer, value);
}

}  // namespace

void Metadata::set(std::string key, MetadataValue value) {
  const auto [entry, inserted] = entries_.try_emplace(std::move(key), std::move(value));
  SBD_CHECK(inserted, "{}: key {} appears twice, expected once; write the file again", source_,
            quote(entry->first));
}

bool Metadata::contains(std::string_view key) const { return entries_.find(key) != entries_.end(); }

const MetadataValue& Metadata::value(std::string_view key, std::string_view expected) const {
  const auto entry = entries_.find(key);
  SBD_CHECK(entry != entries_.end(),
            "{}: key '{}' is missing, expected {}; convert the checkpoint again", source_, key,
            expected);
  return entry->second;
}

template <typename T>
const T& Metadata::get(std::string_view key, std::string_view expected) const {
  const MetadataValue& found = value(key, expected);
  const T* typed = std::get_if<T>(&found);
  SBD_CHECK(typed != nullptr, "{}: key '{}' is {}, expected {}; convert the checkpoint again",
            source_, key, describe(found), expected);
  return *typed;
}

bool Metadata::boolean(std::string_view key) const { return get<bool>(key, "a boolean"); }

std::int64_t Metadata::integer(std::string_view key, std::int64_t low, std::int64_t high) const {
  const auto number = get<std::int64_t>(key, "an integer");
  SBD_CHECK(number >= low && number <= high,
            "{}: key '{}' is {}, expected {} to {}; convert the checkpoint again", source_, key,
            number, low, high);
  return number;
}

double Metadata::number(std::string_view key) const {
  const MetadataValue& found = value(key, "a number");
  if (const auto* whole = std::get_if<std::int64_t>(&found)) {
    return static_cast<double>(*whole);
  }
  return get<double>(key, "a number");
}

const std::string& Metadata::string(std::string_view key) const {
  return get<std::string>(key, "a string");
}

const std::vector<std::int64_t>& Metadata::integers(std::string_view key) const {
  return get<std::vector<std::int64_t>>(key, "an array of integers");
}

const std::vector<double>& Metadata::numbers(std::string_view key) const {
  return get<std::vector<double>>(key, "an array of floats");
}

const std::vector<std::string>& Metadata::strings(std::string_view key) const {
  return get<std::vector<std::string>>(key, "an array of strings");
}

}  // namespace sbd
