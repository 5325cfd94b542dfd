// The table of options: names, ranges, and that each line sets its own field.
#include "decode/options.h"

#include <cmath>
#include <set>
#include <string>

#include "check.h"

namespace sbd {
namespace {

void check(std::string_view name, const OptionValue& value) {
  check_option(find_option(name), value);
}

// A value that no default is, and within the range of every option of its type.
OptionValue another(const Option& option) {
  switch (option.type) {
    case OptionType::integer: return 7;
    case OptionType::number: return 0.625f;
    case OptionType::name: break;
  }
  return std::string(option.choices().back());
}

TEST(options_set_their_own_fields) {
  std::set<std::string_view> names, keys;
  for (const Option& option : all_options()) {
    CHECK(names.insert(option.name).second);
    CHECK(keys.insert(option.key).second);
    CHECK(option.help.ends_with("."));
    const OptionValue value = another(option);
    const DecoderOptions options = with_options({{std::string(option.name), value}}, {});
    CHECK(option.get(options) == value);
    for (const Option& other : all_options()) {
      if (&other != &option) CHECK(other.get(options) == other.get({}));
    }
  }
  CHECK_THROWS_WITH(find_option("beam"), "unknown option \"beam\": expected one of block_size, ");
}

TEST(options_are_checked) {
  check("gamma", 0.0f);
  check("gamma", INFINITY);
  check("factor", INFINITY);
  check("confidence_threshold", 0.0f);
  check("confidence_threshold", 1.0f);
  check("steps", 1 << 16);
  CHECK_THROWS_WITH(check("gamma", -0.5f), "expected `gamma` >= 0, got -0.5");
  CHECK_THROWS_WITH(check("gamma", NAN), "expected `gamma` >= 0, got nan");
  CHECK_THROWS_WITH(check("factor", 0.0f), "expected `factor` above 0, got 0");
  CHECK_THROWS_WITH(check("factor", NAN), "expected `factor` above 0, got nan");
  for (const char* share : {"confidence_threshold", "block_add_threshold",
                            "decoded_token_threshold", "skip_threshold"}) {
    for (const float bad : {-0.25f, 1.5f, NAN}) {
      CHECK_THROWS_WITH(check(share, bad), format("expected `{}` from 0 to 1, got {}", share, bad));
    }
  }
  for (const char* count : {"top_n", "horizon"}) {
    CHECK_THROWS_WITH(check(count, 0), format("expected `{}` >= 1, got 0", count));
  }
  CHECK_THROWS_WITH(check("block_size", 0), "expected `block_size` from 1 to 1024, got 0");
  CHECK_THROWS_WITH(check("block_size", 1025), "got 1025");
  CHECK_THROWS_WITH(check("steps", 0), "expected `steps` from 1 to 65536, got 0");
  CHECK_THROWS_WITH(check("steps", (1 << 16) + 1), "got 65537");
  CHECK_THROWS_WITH(check("unmask", "eb"), "unknown `unmask` \"eb\": expected one of entropy_");
}

}  // namespace
}  // namespace sbd
