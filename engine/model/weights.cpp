#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "core/error.h"
#include "core/random.h"
#include "format/text.h"

namespace sbd {

namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

// Loads by name with the shape the config asks for.
class Loader {
 public:
  Loader(TensorSource& source, Backend& backend) : source_(source), backend_(backend) {}

  bool has(const std::string& name) { return source_.has(name); }

  WeightPtr matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    return backend_.load_weight(source_.get(name, {rows, cols}));
  }

  std::vector<float> values(const std::string& name, std::int64_t n) {
    const Tensor tensor = source_.get(name, {n});
    SBD_CHECK(tensor.dtype == DType::f32, "tensor {}: expected type f32, got {}", name,
              sbd::name(tensor.dtype));
    std::vector<float> result(static_cast<std::size_t>(n));
    std::memcpy(result.data(), tensor.data.data(), tensor.data.size());
    SBD_CHECK(std::all_of(result.begin(), result.end(), [](float x) { return std::isfinite(x); }),
              "tensor {} holds NaN or infinity: the file is damaged, convert it again", name);
    return result;
  }

  Buffer vector(const std::string& name, std::int64_t n) {
    return backend_.upload(values(name, n));
  }

 private:
  TensorSource& source_;
  Backend& backend_;
};

// theta^(-2i/D), divided by linear scaling's factor and by the divisors that the converter computed
// for scalings that differ per dimension (llama3).
std::vector<float> inverse_frequencies(const ModelConfig& config, Loader& loader) {
  const int half = config.head_dim / 2;
  std::vector<float> divisors(static_cast<std::size_t>(half), 1.0f);
  if (loader.has("rope_freqs.weight")) divisors = loader.values("rope_freqs.weight", half);
  for (const float divisor : divisors) {
    SBD_CHECK(divisor > 0, "tensor rope_freqs.weight holds {}, expected numbers above 0", divisor);
  }
  std::vector<float> result;
  for (int i = 0; i < half; ++i) {
    const double frequency = std::pow(config.rope_theta, -2.0 * i / config.head_dim);
    result.push_back(static_cast<float>(frequency / config.rope_linear_factor / divisors[i]));
  }
  return result;
}

}  // namespace

ModelWeights load_weights(const ModelConfig& config, TensorSource& source, Backend& backend) {
  Loader load(source, backend);
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_size = std::int64_t{config.num_attention_heads} * config.head_dim;
  const std::int64_t kv_size = std::int64_t{config.num_key_value_heads} * config.head_dim;

  ModelWeights weights;
  weights.embedding = load.matrix("token_embd.weight", config.vocab_size, hidden);
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    const std::string prefix = "blk." + std::to_string(i) + ".";
    LayerWeights layer;
    layer.attn_norm = load.vector(prefix + "attn_norm.weight", hidden);
    layer.q = load.matrix(prefix + "attn_q.weight", q_size, hidden);
    layer.k = load.matrix(prefix + "attn_k.weight", kv_size, hidden);
    layer.v = load.matrix(prefix + "attn_v.weight", kv_size, hidden);
    if (config.attention_bias || load.has(prefix + "attn_q.bias")) {
      layer.q_bias = load.vector(prefix + "attn_q.bias", q_size);
      layer.k_bias = load.vector(prefix + "attn_k.bias", kv_size);
      layer.v_bias = load.vector(prefix + "attn_v.bias", kv_size);
    }
    if (config.qk_norm) {
      layer.q_norm = load.vector(prefix + "attn_q_norm.weight", config.head_dim);
      layer.k_norm = load.vector(prefix + "attn_k_norm.weight", config.head_dim);
    }
    layer.o = load.matrix(prefix + "attn_output.weight", hidden, q_size);
    if (load.has(prefix + "attn_output.bias")) {
      layer.o_bias = load.vector(prefix + "attn_output.bias", hidden);
    }
    layer.ffn_norm = load.vector(prefix + "ffn_norm.weight", hidden);
    layer.gate = load.matrix(prefix + "ffn_gate.weight", config.intermediate_size, hidden);
    layer.up = load.matrix(prefix + "ffn_up.weight", config.intermediate_size, hidden);
    layer.down = load.matrix(prefix + "ffn_down.weight", hidden, config.intermediate_size);
    weights.layers.push_back(std::move(layer));
  }
  weights.norm = load.vector("output_norm.weight", hidden);
  if (load.has("output.weight")) {
    weights.output = load.matrix("output.weight", config.vocab_size, hidden);
  }
  weights.inverse_frequencies = inverse_frequencies(config, load);
  return weights;
}

Tensor FileTensors::get(const std::string& name, const std::vector<std::int64_t>& shape) {
  release();
  const Tensor* tensor = file_.find(name);
  SBD_CHECK(tensor != nullptr, "{}: tensor {} is missing; convert the checkpoint again",
            file_.metadata().source(), name);
  SBD_CHECK(
      tensor->shape == shape,
      "{}: tensor {}: expected shape {} by the metadata, got {}; convert the checkpoint again",
      file_.metadata().source(), name, shape_text(shape), shape_text(tensor->shape));
  current_ = tensor;
  used_.insert(tensor);
  return *tensor;
}

void FileTensors::release() {
  if (current_ != nullptr) file_.release(*current_);
  current_ = nullptr;
}

void FileTensors::check_all_used() const {
  for (const Tensor& tensor : file_.tensors()) {
    SBD_CHECK(used_.contains(&tensor),
              "{}: tensor {} belongs to an architecture this engine does not compute",
              file_.metadata().source(), quote(tensor.name));
  }
}

// Bytes from a counter; the bits that decide a value's size are set so that values stay near 0.02.
Tensor RandomTensors::get(const std::string& name, const std::vector<std::int64_t>& shape) {
  const DType dtype = shape.size() == 1 ? DType::f32 : dtype_;
  std::size_t n = 1;
  for (const std::int64_t dim : shape) n *= static_cast<std::size_t>(dim);
  SBD_CHECK(shape.back() % values_per_block(dtype) == 0,
            "tensor {}: {} needs rows of a multiple of {} values, got {}", name, sbd::name(dtype),
            values_per_block(dtype), shape.back());
  data_.resize(n / static_cast<std::size_t>(values_per_block(dtype)) * bytes_per_block(dtype));

  const std::uint64_t key = combine(0, std::hash<std::string>{}(name));
  for (std::size_t i = 0; i < data_.size(); i += 8) {
    const std::uint64_t bits = mix64(key + i);
    std::memcpy(data_.data() + i, &bits, std::min<std::size_t>(8, data_.size() - i));
  }
  const auto set = [&](std::size_t offset, auto value) {
    std::memcpy(data_.data() + offset, &value, sizeof(value));
  };
  const auto get16 = [&](std::size_t offset) {
    std::uint16_t value;
    std::memcpy(&value, data_.data() + offset, sizeof(value));
    return value;
  };
  for (std::size_t i = 0; i < data_.size(); i += bytes_per_block(dtype)) {
    switch (dtype) {
      case DType::f32: set(i, shape.size() == 1 ? 1.0f : (uniform(key, i) - 0.5f) * 0.04f); break;
      case DType::f16: set(i, static_cast<std::uint16_t>((get16(i) & 0x83ffu) | 0x2000u)); break;
      case DType::bf16: set(i, static_cast<std::uint16_t>((get16(i) & 0x807fu) | 0x3c00u)); break;
      case DType::q8_0: set(i, std::uint16_t{0x0a00}); break;  // scale 1.8e-4
      case DType::q4_0: set(i, std::uint16_t{0x1a00}); break;  // scale 2.9e-3
      case DType::q4_k:                                        // 0 in the mean: min = 7.5 scale
        set(i + offsetof(BlockQ4_K, scale), std::uint16_t{0x068e});  // 1e-4
        set(i + offsetof(BlockQ4_K, min), std::uint16_t{0x1225});    // 7.5e-4
        break;
      case DType::q6_k: set(i + offsetof(BlockQ6_K, scale), std::uint16_t{0x0150}); break;  // 2e-5
    }
  }
  return {name, dtype, shape, data_};
}

}  // namespace sbd
