// The options of decoding, by name: what a request may ask for and a model file's `sbd.*` keys may
// say. A new one is a field of its method, and one line of the table in options.cpp.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "decode/block_method.h"
#include "decode/d2f.h"
#include "decode/dmtd.h"
#include "decode/draft_policy.h"

namespace sbd {

// What the methods need beyond the task: a model file's, or these with a request's in their place.
// Each decoder takes what it uses.
struct DecoderOptions {
  std::vector<std::string> named = {"ntp"};  // by the model file: `auto` takes the first
  bool has_mask_token = false;
  bool has_layer_cut = false;
  bool has_adapter = false;         // drafts run with it
  bool has_mask_embedding = false;  // it brings their masks
  BlockMethod block;
  DmtdMethod dmtd;
  D2fMethod d2f;  // its thresholds: the rest is the block's
  // What drafts go by that need not keep to block.block_size and block.unmask; none: all do.
  std::shared_ptr<DraftHistory> drafts = {};
  bool block_size_asked = false;
  bool unmask_asked = false;
};

using OptionValue = std::variant<int, float, std::string>;
using OptionValues = std::map<std::string, OptionValue, std::less<>>;

// A decoder reads the options of its groups; of those for unmasking, its rule's.
namespace option_group {
inline constexpr unsigned block = 1, unmask = 2, steps = 4, dmtd = 8, d2f = 16;
}

// Sixteen times the largest in use. A block is one forward, for which others wait and which no
// interrupt ends: without a bound a file of a few bytes, or a request, could ask for one that takes
// all memory and time.
inline constexpr int kMaxBlockSize = 1 << 10;

struct Range {
  double low;
  double high;
  bool above = false;  // low itself is outside

  bool holds(double value) const {  // never of a NaN
    return (above ? value > low : value >= low) && value <= high;
  }
  std::string words() const;  // such as ">= 1" or "from 0 to 1"
};

enum class OptionType { integer, number, name };

struct Option {
  std::string_view name;  // of the argument; on the command line with hyphens
  std::string_view key;   // in a model file, behind "sbd."
  unsigned group;
  unsigned rules = 0;  // those of unmasking that read it, a bit each; 0: it is no rule's
  std::string_view help;
  std::string_view older_key = {};  // that files may still have
  // Of its field:
  OptionType type = {};
  Range range = {};                                                    // of numbers
  std::vector<std::string_view> (*choices)() = nullptr;                // of names
  std::optional<OptionValue> (*get)(const DecoderOptions&) = nullptr;  // nothing: it is not set
  void (*set)(DecoderOptions&, const OptionValue&) = nullptr;          // one that was checked

  bool read_by(UnmaskRule rule) const {
    return rules == 0 || (rules >> static_cast<unsigned>(rule) & 1u) != 0;
  }
};

std::span<const Option> all_options();
const Option& find_option(std::string_view name);

// Refuse what is outside its range, by the option's name.
void check_option(const Option& option, const OptionValue& value);
void check_options(const DecoderOptions& options);

// The file's options with those asked for in their place.
DecoderOptions with_options(const OptionValues& asked, DecoderOptions file);

}  // namespace sbd
