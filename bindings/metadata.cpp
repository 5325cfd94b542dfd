#include "metadata.h"

#include <pybind11/stl.h>

#include <array>
#include <charconv>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/error.h"
#include "core/names.h"
#include "request.h"

namespace py = pybind11;

namespace sbd {
namespace {

template <typename T>
std::vector<T> cast_all(const py::sequence& items) {
  std::vector<T> values;
  values.reserve(items.size());
  for (const py::handle item : items) {
    values.push_back(item.cast<T>());
  }
  return values;
}

template <typename... Types>
bool all_are(const py::sequence& items) {
  for (const py::handle item : items) {
    // bool is a kind of int in Python, and not in a model file.
    const bool is_bool = py::isinstance<py::bool_>(item);
    const bool fits =
        ((py::isinstance<Types>(item) && (is_bool == std::is_same_v<Types, py::bool_>)) || ...);
    if (!fits) {
      return false;
    }
  }
  return true;
}

MetadataValue to_value(const std::string& key, const py::handle value) {
  if (py::isinstance<py::bool_>(value)) {
    return value.cast<bool>();
  }
  if (py::isinstance<py::int_>(value)) {
    return value.cast<std::int64_t>();
  }
  if (py::isinstance<py::float_>(value)) {
    return value.cast<double>();
  }
  if (py::isinstance<py::str>(value)) {
    return value.cast<std::string>();
  }
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
    const auto items = py::reinterpret_borrow<py::sequence>(value);
    if (all_are<py::bool_>(items) && items.size() > 0) {
      return cast_all<bool>(items);
    }
    if (all_are<py::int_>(items)) {
      return cast_all<std::int64_t>(items);
    }
    if (all_are<py::int_, py::float_>(items)) {
      return cast_all<double>(items);
    }
    if (all_are<py::str>(items)) {
      return cast_all<std::string>(items);
    }
  }
  fail(ErrorKind::value, "metadata {}: expected bool, int, float, str or a list of one, got {}",
       key, py::repr(value).cast<std::string>());
}

// The shortest decimal that is this float: 0.35f is 0.35 in Python as well.
double shortest(float value) {
  std::array<char, 32> digits{};
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
  return py::float_(py::str(digits.data(), static_cast<std::size_t>(end - digits.data())));
}

py::object to_object(const std::optional<OptionValue>& value) {
  if (!value) return py::none();
  if (const auto* number = std::get_if<float>(&*value)) return py::float_(shortest(*number));
  return py::cast(*value);
}

}  // namespace

py::dict to_dict(const Metadata& metadata) {
  py::dict values;
  for (const auto& [key, value] : metadata.entries()) {
    values[py::str(key)] =
        std::visit([](const auto& held) -> py::object { return py::cast(held); }, value);
  }
  return values;
}

py::dict to_dict(const ModelConfig& config) {
  py::dict values;
  values["architecture"] = config.architecture;
  values["num_hidden_layers"] = config.num_hidden_layers;
  values["hidden_size"] = config.hidden_size;
  values["intermediate_size"] = config.intermediate_size;
  values["num_attention_heads"] = config.num_attention_heads;
  values["num_key_value_heads"] = config.num_key_value_heads;
  values["head_dim"] = config.head_dim;
  values["vocab_size"] = config.vocab_size;
  values["max_position_embeddings"] = config.max_position_embeddings;
  values["sliding_window"] = config.sliding_window;
  values["rms_norm_eps"] = shortest(config.rms_norm_eps);
  values["rope_theta"] = config.rope_theta;
  values["attention_bias"] = config.attention_bias;
  values["qk_norm"] = config.qk_norm;
  values["eos_token_ids"] = config.eos_token_ids;
  values["mask_token_id"] = config.mask_token_id;
  return values;
}

py::dict to_dict(const DecoderOptions& defaults) {
  const BlockMethod& block = defaults.block;
  py::dict values;
  values["decoders"] = defaults.named;
  for (const Option& option : all_options()) {
    values[py::str(option.name)] = to_object(option.get(defaults));
  }
  values["sub_block_size"] = block.sub_block_size;
  values["schedule"] = name_of(kSchedules, block.schedule);
  values["logit_shift"] = block.logit_shift;
  values["seed_slot"] = block.seed_slot;
  values["prompt_attention"] = name_of(kPromptAttentions, block.prompt_attention);
  values["block_origin"] = name_of(kBlockOrigins, block.absolute_blocks);
  values["commit_attention"] = name_of(kCommitAttentions, block.commit_attention);
  values["prompt_rule"] = name_of(kDmtdPromptRules, defaults.dmtd.prompt_rule);
  return values;
}

py::dict in_force(const std::string& decoder, DecoderOptions options) {
  options.block.unmask.proxy = order(options.block.unmask);
  py::dict values;
  for (const Option* option : options_in_force(decoder, options)) {
    values[py::str(option->name)] = to_object(option->get(options));
  }
  return values;
}

Metadata to_metadata(const py::dict& values) {
  Metadata metadata;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
    metadata.set(name, to_value(name, value));
  }
  return metadata;
}

}  // namespace sbd
