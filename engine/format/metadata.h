// The key-value part of a model file, with typed access whose errors name the key.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace sbd {

// GGUF's integer widths become int64, its float widths double.
using MetadataValue =
    std::variant<bool, std::int64_t, double, std::string, std::vector<bool>,
                 std::vector<std::int64_t>, std::vector<double>, std::vector<std::string>>;

class Metadata {
 public:
  // `source` names where the keys come from in errors: the model file.
  explicit Metadata(std::string source = "metadata") : source_(std::move(source)) {}
  const std::string& source() const { return source_; }

  void set(std::string key, MetadataValue value);  // a key that is already there is an error
  bool contains(std::string_view key) const;
  const std::map<std::string, MetadataValue, std::less<>>& entries() const { return entries_; }

  // A missing key, or a value of another type, is an error that names the key. A double key accepts
  // an integer value; an integer key checks the range [low, high].
  bool boolean(std::string_view key) const;
  std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high) const;
  double number(std::string_view key) const;
  const std::string& string(std::string_view key) const;
  const std::vector<std::int64_t>& integers(std::string_view key) const;
  const std::vector<double>& numbers(std::string_view key) const;  // floats alone
  const std::vector<std::string>& strings(std::string_view key) const;

 private:
  const MetadataValue& value(std::string_view key, std::string_view expected) const;
  template <typename T>
  const T& get(std::string_view key, std::string_view expected) const;

  std::string source_;
  std::map<std::string, MetadataValue, std::less<>> entries_;
};

}  // namespace sbd
