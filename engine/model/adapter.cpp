#include "model/adapter.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>

#include "core/error.h"

namespace sbd {
namespace {

// A matmul that an adapter may change.
struct Place {
  std::string_view name;
  Adapter::Pair Adapter::Layer::* pair;
  std::int64_t out, in;
};

std::array<Place, 7> places(const ModelConfig& config) {
  const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const std::int64_t q = std::int64_t{config.num_attention_heads} * config.head_dim;
  const std::int64_t kv = std::int64_t{config.num_key_value_heads} * config.head_dim;
  using Layer = Adapter::Layer;
  return {{{"attn_q", &Layer::q, q, hidden},
           {"attn_k", &Layer::k, kv, hidden},
           {"attn_v", &Layer::v, kv, hidden},
           {"attn_output", &Layer::o, hidden, q},
           {"ffn_gate", &Layer::gate, inner, hidden},
           {"ffn_up", &Layer::up, inner, hidden},
           {"ffn_down", &Layer::down, hidden, inner}}};
}

constexpr std::string_view kMaskEmbedding = "sbd.draft.mask_embedding";

void check_keys(const Metadata& metadata, const ModelConfig& config) {
  const auto check_string = [&](std::string_view key, std::string_view expected) {
    SBD_CHECK(metadata.contains(key) && metadata.string(key) == expected,
              "{}: expected an adapter, whose key '{}' is '{}'", metadata.source(), key, expected);
  };
  check_string("general.type", "adapter");
  check_string("adapter.type", "lora");
  const std::string& architecture = metadata.string("general.architecture");
  SBD_CHECK(architecture == config.architecture,
            "{}: an adapter of architecture '{}', expected the model's, '{}'", metadata.source(),
            architecture, config.architecture);
  const double alpha = metadata.number("adapter.lora.alpha");
  SBD_CHECK(std::abs(alpha) <= std::numeric_limits<float>::max(),
            "{}: key 'adapter.lora.alpha' is {}, expected a finite number", metadata.source(),
            alpha);
}

// The two factors of a place in a layer, where the file has them.
Adapter::Pair load_pair(FileTensors& tensors, const GgufFile& file, const std::string& name,
                        const Place& place, Backend& backend) {
  const std::string name_a = name + ".lora_a", name_b = name + ".lora_b";
  const FileTensor *a = file.find(name_a), *b = file.find(name_b);
  if (a == nullptr && b == nullptr) return {};
  const std::string& source = file.metadata().source();
  SBD_CHECK(a != nullptr && b != nullptr,
            "{}: tensor {} is missing: expected it beside {}; lora_a and lora_b come in pairs",
            source, a == nullptr ? name_a : name_b, a == nullptr ? name_b : name_a);
  const std::int64_t most = std::min(place.out, place.in);
  const std::int64_t rank = a->shape.front();
  SBD_CHECK(a->shape == (std::vector<std::int64_t>{rank, place.in}) && rank >= 1 && rank <= most,
            "{}: tensor {}: expected shape [rank, {}] with a rank from 1 to {} by the model, got "
            "{}: give the adapter of this model",
            source, name_a, place.in, most, shape_text(a->shape));
  SBD_CHECK(b->shape == (std::vector<std::int64_t>{place.out, rank}),
            "{}: tensor {}: expected shape [{}, {}] by the model and lora_a's rank, got {}: give "
            "the adapter of this model",
            source, name_b, place.out, rank, shape_text(b->shape));
  Adapter::Pair pair;
  pair.a = backend.load_weight(tensors.get(name_a, a->shape));
  pair.b = backend.load_weight(tensors.get(name_b, b->shape));
  const double alpha = file.metadata().number("adapter.lora.alpha");
  pair.scale = static_cast<float>(alpha / static_cast<double>(rank));
  return pair;
}

}  // namespace

Adapter load_adapter(const GgufFile& file, const ModelConfig& config, Backend& backend) {
  check_keys(file.metadata(), config);
  const std::string& source = file.metadata().source();
  SBD_CHECK(!file.tensors().empty(), "{}: an adapter without tensors: expected some such as {}",
            source, "blk.0.attn_q.weight.lora_a");
  Adapter adapter;
  adapter.layers.resize(static_cast<std::size_t>(config.num_hidden_layers));
  FileTensors tensors(file);
  const auto all = places(config);
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    for (const Place& place : all) {
      adapter.layers[static_cast<std::size_t>(i)].*place.pair =
          load_pair(tensors, file, format("blk.{}.{}.weight", i, place.name), place, backend);
    }
  }
  if (const FileTensor* mask = file.find(kMaskEmbedding)) {
    SBD_CHECK(mask->shape == (std::vector<std::int64_t>{config.hidden_size}),
              "{}: tensor {}: expected shape [{}] by the model, got {}: give the adapter of this "
              "model",
              source, kMaskEmbedding, config.hidden_size, shape_text(mask->shape));
    adapter.mask_embedding =
        backend.upload(read_values(tensors, std::string(kMaskEmbedding), config.hidden_size));
  }
  tensors.check_all_used(
      "is none of an adapter's for this model: expected pairs for the matrices "
      "of its layers, and sbd.draft.mask_embedding");
  return adapter;
}

}  // namespace sbd
