// Number formats, random numbers and messages, each against its definition.
#include <cmath>
#include <set>
#include <sstream>

#include "check.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/random.h"
#include "reference.h"

namespace sbd {
namespace {

using namespace test;

TEST(halves_and_bf16_have_the_values_of_their_definition) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto stored = static_cast<std::uint16_t>(bits);
    for (const auto& [actual, expected] :
         {std::pair<double, double>(half_to_float(stored), half_value(stored)),
          std::pair<double, double>(bf16_to_float(stored), bf16_value(stored))}) {
      if (std::isnan(expected)) {
        CHECK(std::isnan(actual));
      } else {
        CHECK_EQ(actual, expected);
        CHECK_EQ(std::signbit(actual), std::signbit(expected));
      }
    }
  }
  // The definition itself, at values everybody knows.
  CHECK_EQ(half_value(0x3c00), 1.0);
  CHECK_EQ(half_value(0x7bff), 65504.0);
  CHECK_EQ(half_value(0x0001), 0x1p-24);
  CHECK_EQ(half_value(0xc000), -2.0);
  CHECK_EQ(bf16_value(0x3f80), 1.0);
  CHECK_EQ(bf16_value(0xbfc0), -1.5);
}

TEST(the_comparison_fails_what_it_must) {
  const std::vector<double> expected = {1.0, -2.0, 3.0};
  const std::vector<double> tolerance(3, 0.01);
  const auto passes = [&](std::vector<float> actual) {
    return mismatch(actual, expected, tolerance).empty();
  };
  CHECK(passes({1.0f, -2.0f, 3.0f}));
  CHECK(passes({1.005f, -2.005f, 3.0f}));
  CHECK(!passes({1.0f, -2.0f, 3.02f}));
  CHECK(!passes({1.0f, 2.0f, 3.0f}));       // a wrong sign
  CHECK(!passes({-1.0f, 2.0f, -3.0f}));     // all of them
  CHECK(!passes({0.0f, 0.0f, 0.0f}));       // nothing computed
  CHECK(!passes({1.0f, NAN, 3.0f}));        // not a number
  CHECK(!passes({1.0f, -2.0f, INFINITY}));  //
  CHECK(!passes({1.0f, -2.0f}));            // something missing
  const std::vector<double> unknown = {1.0, NAN, 3.0};
  CHECK(!mismatch(std::vector<float>{1.0f, -2.0f, 3.0f}, unknown, tolerance).empty());
  CHECK(!mismatch(std::vector<float>{1.0f, -2.0f, 3.0f}, expected, unknown).empty());
}

TEST(blocks_know_their_sizes) {
  for (const DType type : kDTypes) {
    Random random(1);
    const StoredTensor tensor = random_matrix("w", type, 2, 256, 1.0, random);
    CHECK_EQ(tensor.bytes.size(),
             512u / static_cast<std::size_t>(values_per_block(type)) * bytes_per_block(type));
    CHECK_EQ(values_of(tensor).size(), 512u);
  }
}

TEST(uniform_lies_in_the_open_interval) {
  // Every value of the hash that can come up is a counter's; its extremes decide the interval's
  // ends, and they come up once in some 10^7 draws.
  float lowest = 1.0f;
  float highest = 0.0f;
  double sum = 0;
  constexpr int n = 1 << 26;
  for (std::uint64_t counter = 0; counter < n; ++counter) {
    const float u = uniform(3, counter);
    lowest = u < lowest ? u : lowest;
    highest = u > highest ? u : highest;
    sum += u;
  }
  CHECK(lowest > 0.0f && lowest < 1e-6f);
  CHECK(highest < 1.0f && highest > 1.0f - 1e-6f);
  CHECK(std::isfinite(std::log(-std::log(highest))) && std::isfinite(std::log(-std::log(lowest))));
  CHECK_NEAR(sum / n, 0.5, 5 * std::sqrt(1.0 / 12 / n));
}

TEST(random_numbers_depend_on_every_part_of_their_key) {
  std::set<std::uint64_t> seen;
  for (std::uint64_t key = 0; key < 100; ++key) {
    for (std::uint64_t value = 0; value < 100; ++value) seen.insert(combine(key, value));
  }
  CHECK_EQ(seen.size(), 10000u);  // (a, b) and (b, a) differ as well
  CHECK_EQ(combine(5, 7), combine(5, 7));
}

TEST(format_fills_holes_in_order) {
  CHECK_EQ(format("rows {} of {}", 3, 4), std::string("rows 3 of 4"));
  CHECK_EQ(format("nothing"), std::string("nothing"));
  CHECK_EQ(format("{}{}", "a", 1.5), std::string("a1.5"));
  CHECK_EQ(format("a hole left: {}"), std::string("a hole left: {}"));
  CHECK_EQ(format("{}", std::string("{}")), std::string("{}"));
  CHECK_EQ(format("{} of {}", std::string("{}"), 2), std::string("{} of 2"));
}

TEST(a_failed_check_is_an_error_with_its_kind) {
  const auto check = [](int n) { SBD_CHECK(n < 3, "expected less than 3, got {}", n); };
  check(2);
  CHECK_THROWS_WITH(check(3), "expected less than 3, got 3");
  try {
    fail(ErrorKind::file, "no");
  } catch (const Error& error) {
    CHECK_EQ(error.kind(), ErrorKind::file);
  }
}

}  // namespace
}  // namespace sbd
