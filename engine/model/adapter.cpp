#include "model/adapter.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "core/bytes.h"
#include "core/dtype.h"
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

// Of 0 <= x < 65504.
std::uint16_t nearest_half(float x) {
  if (x < 0x1p-14f) return static_cast<std::uint16_t>(std::lround(x * 0x1p24f));
  const auto bits = std::bit_cast<std::uint32_t>(x) - (112u << 23);
  return static_cast<std::uint16_t>((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

// Of halves, all of them finite.
std::vector<std::byte> to_q8_0(std::span<const std::byte> halves) {
  std::vector<std::byte> blocks;
  for (std::size_t at = 0; at < halves.size(); at += kGroupSize * 2) {
    float x[kGroupSize], largest = 0;
    for (std::size_t i = 0; i < kGroupSize; ++i) {
      x[i] = half_to_float(load_as<std::uint16_t>(halves.data() + at + i * 2));
      largest = std::max(largest, std::abs(x[i]));
    }
    BlockQ8_0 block{};
    block.scale = nearest_half(largest / 127);
    const float scale = half_to_float(block.scale);
    for (std::size_t i = 0; i < kGroupSize && scale > 0; ++i) {
      const float quant = std::clamp(std::round(x[i] / scale), -127.0f, 127.0f);
      block.quants[i] = static_cast<std::int8_t>(quant);
    }
    const auto bytes = std::as_bytes(std::span(&block, 1));
    blocks.insert(blocks.end(), bytes.begin(), bytes.end());
  }
  return blocks;
}

WeightPtr load_factor(const Tensor& tensor, bool quantised, Backend& backend) {
  const auto finite = [&] {
    for (std::size_t at = 0; at < tensor.data.size(); at += 2) {
      if (!half_is_finite(load_as<std::uint16_t>(tensor.data.data() + at))) return false;
    }
    return true;
  };
  const bool rounds =
      quantised && tensor.dtype == DType::f16 && tensor.shape[1] % kGroupSize == 0 && finite();
  if (!rounds) return backend.load_weight(tensor);
  const std::vector<std::byte> blocks = to_q8_0(tensor.data);
  return backend.load_weight({tensor.name, DType::q8_0, tensor.shape, blocks});
}

// The two factors of a place in a layer, where the file has them.
Adapter::Pair load_pair(FileTensors& tensors, const GgufFile& file, const std::string& name,
                        const Place& place, bool quantised, Backend& backend) {
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
  pair.a = load_factor(tensors.get(name_a, a->shape), quantised, backend);
  pair.b = load_factor(tensors.get(name_b, b->shape), quantised, backend);
  const double alpha = file.metadata().number("adapter.lora.alpha");
  pair.scale = static_cast<float>(alpha / static_cast<double>(rank));
  return pair;
}

}  // namespace

Adapter load_adapter(const GgufFile& file, const ModelConfig& config, Backend& backend,
                     bool quantised) {
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
      adapter.layers[static_cast<std::size_t>(i)].*place.pair = load_pair(
          tensors, file, format("blk.{}.{}.weight", i, place.name), place, quantised, backend);
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
