// A small test harness. TEST(name) { CHECK(...); } registers itself; a failed check prints its
// place and values and the test goes on, an exception ends it. main.cpp runs what the filter
// matches.
#pragma once

#include <concepts>
#include <cstdio>
#include <exception>
#include <ostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/error.h"

namespace sbd::test {

struct Test {
  const char* name;
  void (*body)();
  bool on_every_isa;  // does it try every instruction set by itself?
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registrar {
  Registrar(const char* name, void (*body)(), bool on_every_isa) {
    tests().push_back({name, body, on_every_isa});
  }
};

inline int failed_checks = 0;
inline bool asked_for_every_isa = false;  // by the test that runs

inline void report(const char* file, int line, const std::string& what) {
  ++failed_checks;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

// For a test's reader; nothing fails.
inline void remark(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: note: %s\n", file, line, what.c_str());
}

template <typename T>
std::string show(const T& value) {
  std::ostringstream out;
  out.precision(17);
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    out << (value ? "true" : "false");
  } else if constexpr (requires { out << value; }) {
    out << value;
  } else if constexpr (requires {
                         value.begin();
                         value.end();
                       }) {
    out << "[";
    for (const auto& element : value) {
      out << show(element) << " ";
    }
    out << "]";
  } else {
    out << "(a value that cannot be printed)";
  }
  return out.str();
}

template <typename T>
concept PlainInteger = std::integral<T> && !std::same_as<T, bool> && !std::same_as<T, char>;

template <typename A, typename B>
bool equal(const A& a, const B& b) {
  if constexpr (PlainInteger<A> && PlainInteger<B>) {
    return std::cmp_equal(a, b);
  } else {
    return a == b;
  }
}

template <typename A, typename B>
void check_equal(const char* file, int line, const char* text, const A& actual, const B& expected) {
  if (!equal(actual, expected)) {
    report(file, line, std::string(text) + " is " + show(actual) + ", expected " + show(expected));
  }
}

inline void check_near(const char* file, int line, const char* text, double actual, double expected,
                       double tolerance) {
  if (!(actual - expected <= tolerance && expected - actual <= tolerance)) {
    report(file, line,
           std::string(text) + " is " + show(actual) + ", expected " + show(expected) + " +- " +
               show(tolerance));
  }
}

template <typename Call>
void check_throws(const char* file, int line, const char* text, Call call,
                  const std::string& expected) {
  try {
    call();
    report(file, line, std::string(text) + " threw nothing, expected: " + expected);
  } catch (const Error& error) {
    const std::string message = error.what();
    if (message.find(expected) == std::string::npos) {
      report(file, line, std::string(text) + " threw\n  " + message + "\n  without: " + expected);
    }
    if (message.find('\n') != std::string::npos) {
      report(file, line, std::string(text) + " threw more than one line:\n" + message);
    }
  } catch (const std::exception& error) {
    report(file, line, std::string(text) + " threw another type of exception: " + error.what());
  }
}

}  // namespace sbd::test

#define SBD_TEST(name, on_every_isa)                                                    \
  static void test_##name();                                                            \
  static const sbd::test::Registrar registrar_##name(#name, test_##name, on_every_isa); \
  static void test_##name()

#define TEST(name) SBD_TEST(name, false)
#define TEST_ON_EVERY_ISA(name) SBD_TEST(name, true)

#define CHECK(...)                                                      \
  do {                                                                  \
    if (!(__VA_ARGS__)) {                                               \
      sbd::test::report(__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ")"); \
    }                                                                   \
  } while (false)

#define CHECK_EQ(actual, expected) \
  sbd::test::check_equal(__FILE__, __LINE__, #actual, (actual), (expected))

// An absolute tolerance; a NaN fails.
#define CHECK_NEAR(actual, expected, tolerance)                                   \
  sbd::test::check_near(__FILE__, __LINE__, #actual, static_cast<double>(actual), \
                        static_cast<double>(expected), static_cast<double>(tolerance))

// The expression must throw an sbd::Error of one line that contains the substring.
#define CHECK_THROWS_WITH(expression, substring) \
  sbd::test::check_throws(                       \
      __FILE__, __LINE__, #expression, [&] { static_cast<void>(expression); }, substring)
