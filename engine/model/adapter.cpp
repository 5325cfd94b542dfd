#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace sbd {

Adapter load_adapter(const GgufFile& file, const ModelConfig& config, Backend& backend) {
  const Metadata& metadata = file.metadata();
  const auto check_string = [&](std::string_view key, std::string_view expected) {
    SBD_CHECK(metadata.contains(key) && metadata.string(key) == expected,
              "{}: expected an adapter, whose key '{}' is '{}'", metadata.source(), key, expected);
  };
  check_string("general.type", "adapter");
  check_string("adapter.type", "lora");
  check_string("general.architecture", config.architecture);

  const auto attended = std::int64_t{config.num_attention_heads} * config.head_dim;
  const auto tensor_name = [](int layer, char side) {
    return format("blk.{}.attn_output.weight.lora_{}", layer, side);
  };
  Adapter adapter;
  adapter.layers.resize(static_cast<std::size_t>(config.num_hidden_layers));
  FileTensors tensors(file);
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    const FileTensor* a = file.find(tensor_name(i, 'a'));
    if (a == nullptr) continue;
    if (adapter.rank == 0) {
      // The shape is checked below; a rank is no more than the smaller side of what it adapts.
      adapter.rank = static_cast<int>(std::min<std::int64_t>(a->shape[0], config.hidden_size));
    }
    auto& layer = adapter.layers[static_cast<std::size_t>(i)];
    layer.a = backend.load_weight(tensors.get(tensor_name(i, 'a'), {adapter.rank, attended}));
    layer.b =
        backend.load_weight(tensors.get(tensor_name(i, 'b'), {config.hidden_size, adapter.rank}));
  }
  SBD_CHECK(adapter.rank > 0, "{}: expected tensors such as {}, found none", metadata.source(),
            tensor_name(0, 'a'));
  tensors.check_all_used();
  const double alpha = metadata.number("adapter.lora.alpha");
  SBD_CHECK(std::abs(alpha) <= std::numeric_limits<float>::max(),
            "{}: key 'adapter.lora.alpha' is {}, expected a finite number", metadata.source(),
            alpha);
  adapter.scale = static_cast<float>(alpha / adapter.rank);
  return adapter;
}

}  // namespace sbd
