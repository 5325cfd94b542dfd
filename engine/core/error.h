// Every failure a user can cause is an Error whose message says what is wrong, the expected and the
// actual value, and how to mend it. Bindings turn the kind into the fitting Python exception.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace sbd {

enum class ErrorKind {
  value,    // an argument or a model file's content is wrong
  file,     // the operating system refused a file
  memory,   // the machine has not enough of it
  device,   // the device failed, and all it held is lost: what runs on it cannot go on
  grammar,  // a text cannot go on under its grammar, whose limits it has met
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// format("rows {} of {}", 3, 4) == "rows 3 of 4"; gcc 12 has no <format>.
inline void format_to(std::ostringstream& out, std::string_view text) { out << text; }

template <typename First, typename... Rest>
void format_to(std::ostringstream& out, std::string_view text, const First& first,
               const Rest&... rest) {
  const auto hole = text.find("{}");
  if (hole == std::string_view::npos) {
    out << text;
    return;
  }
  out << text.substr(0, hole) << first;
  format_to(out, text.substr(hole + 2), rest...);
}

template <typename... Args>
std::string format(std::string_view text, const Args&... args) {
  std::ostringstream out;
  format_to(out, text, args...);
  return out.str();
}

// "a, b, c"
template <typename Items>
std::string joined(const Items& items) {
  std::ostringstream out;
  bool first = true;
  for (const auto& item : items) {
    out << (first ? "" : ", ") << item;
    first = false;
  }
  return out.str();
}

template <typename... Args>
[[noreturn]] void fail(ErrorKind kind, std::string_view text, const Args&... args) {
  throw Error(kind, format(text, args...));
}

}  // namespace sbd

// The message's arguments are evaluated only when the condition fails.
#define SBD_CHECK(condition, ...)                        \
  do {                                                   \
    if (!(condition)) {                                  \
      ::sbd::fail(::sbd::ErrorKind::value, __VA_ARGS__); \
    }                                                    \
  } while (false)
