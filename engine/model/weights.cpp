#include "model/weights.h"

#include <algorithm>
#include <cmath>

#include "core/bytes.h"
#include "core/error.h"
#include "core/interrupt.h"
#include "core/random.h"
#include "format/text.h"
#include "model/rope.h"

namespace sbd {

namespace {

float value(const Tensor& tensor, std::size_t i) {
  const std::byte* data = tensor.data.data();
  switch (tensor.dtype) {
    case DType::f32: return load_as<float>(data + i * 4);
    case DType::f16: return half_to_float(load_as<std::uint16_t>(data + i * 2));
    case DType::bf16: return bf16_to_float(load_as<std::uint16_t>(data + i * 2));
    default:
      fail(ErrorKind::value, "tensor {}: expected type f32, f16 or bf16, got {}", tensor.name,
           name(tensor.dtype));
  }
}

// Loads by name with the shape the config asks for.
class Loader {
 public:
  Loader(TensorSource& source, Backend& backend) : source_(source), backend_(backend) {}

  bool has(const std::string& name) { return source_.has(name); }

  WeightPtr matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    check_interrupt();
    return source_.matrix(name, rows, cols, backend_);
  }

  std::vector<float> values(const std::string& name, std::int64_t n) {
    return read_values(source_, name, n);
  }

  Buffer vector(const std::string& name, std::int64_t n) {
    return backend_.upload(values(name, n));
  }

 private:
  TensorSource& source_;
  Backend& backend_;
};

// The model's frequencies, and by the divisors that the converter computed for scalings that the
// metadata does not say (llama3).
std::vector<float> inverse_frequencies(const ModelConfig& config, Loader& loader) {
  std::vector<float> result = rope_frequencies(config);
  if (!loader.has("rope_freqs.weight")) return result;
  const auto n = static_cast<std::int64_t>(result.size());
  const std::vector<float> divisors = loader.values("rope_freqs.weight", n);
  for (std::size_t i = 0; i < result.size(); ++i) {
    SBD_CHECK(divisors[i] > 0, "tensor rope_freqs.weight holds {}, expected numbers above 0",
              divisors[i]);
    result[i] /= divisors[i];
  }
  return result;
}

}  // namespace

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

std::vector<float> read_values(TensorSource& source, const std::string& name, std::int64_t n) {
  const Tensor tensor = source.get(name, {n});
  std::vector<float> result(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = value(tensor, i);
  SBD_CHECK(std::all_of(result.begin(), result.end(), [](float x) { return std::isfinite(x); }),
            "tensor {} holds NaN or infinity: the file is damaged, convert it again", name);
  return result;
}

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

WeightPtr TensorSource::matrix(const std::string& name, std::int64_t rows, std::int64_t cols,
                               Backend& backend) {
  return backend.load_weight(get(name, {rows, cols}));
}

FileTensors::FileTensors(const GgufFile& file) : file_(file) {
  const std::string why = why_types_cannot_run(file.tensors());
  SBD_CHECK(why.empty(), "{}: {}", file.metadata().source(), why);
}

Tensor FileTensors::get(const std::string& name, const std::vector<std::int64_t>& shape) {
  const FileTensor* tensor = file_.find(name);
  SBD_CHECK(tensor != nullptr, "{}: tensor {} is missing; convert the checkpoint again",
            file_.metadata().source(), name);
  SBD_CHECK(
      tensor->shape == shape,
      "{}: tensor {}: expected shape {} by the metadata, got {}; convert the checkpoint again",
      file_.metadata().source(), name, shape_text(shape), shape_text(tensor->shape));
  used_.insert(tensor);
  constexpr std::size_t kKept = 128 << 20;  // a larger one, the embedding's, is not held for others
  if (n_data_ < tensor->n_bytes || n_data_ > kKept) {
    data_ = nullptr;  // first: never two of them
    data_ = std::make_unique_for_overwrite<std::byte[]>(tensor->n_bytes);
    n_data_ = tensor->n_bytes;
  }
  const std::span<std::byte> data(data_.get(), tensor->n_bytes);
  file_.read(*tensor, data);
  return {tensor->name, *tensor->dtype, tensor->shape, data};
}

double FileTensors::bytes(const Backend& backend) const {
  double sum = 0;
  for (const FileTensor& tensor : file_.tensors()) {
    sum += tensor.shape.size() == 2
               ? backend.weight_bytes(*tensor.dtype, static_cast<double>(tensor.shape[0]),
                                      static_cast<double>(tensor.shape[1]))
               : static_cast<double>(tensor.n_bytes);
  }
  return sum;
}

void FileTensors::check_all_used(std::string_view otherwise) const {
  for (const FileTensor& tensor : file_.tensors()) {
    SBD_CHECK(used_.contains(&tensor), "{}: tensor {} {}", file_.metadata().source(),
              quote(tensor.name), otherwise);
  }
}

WeightPtr RandomTensors::matrix(const std::string& name, std::int64_t rows, std::int64_t cols,
                                Backend& backend) {
  SBD_CHECK(cols % values_per_block(dtype_) == 0,
            "tensor {}: {} needs rows of a multiple of {} values, got {}", name, sbd::name(dtype_),
            values_per_block(dtype_), cols);
  const std::uint64_t key = combine(0, std::hash<std::string>{}(name));
  return backend.random_weight(dtype_, static_cast<int>(rows), static_cast<int>(cols), key);
}

double RandomTensors::bytes(const ModelConfig& config, const Backend& backend) const {
  const double hidden = config.hidden_size, intermediate = config.intermediate_size;
  const double q_size = double(config.num_attention_heads) * config.head_dim;
  const double kv_size = double(config.num_key_value_heads) * config.head_dim;
  const auto matrix = [&](double rows, double cols) {
    return backend.weight_bytes(dtype_, rows, cols);
  };
  const double layer = matrix(q_size, hidden) + 2 * matrix(kv_size, hidden) +
                       matrix(hidden, q_size) + 2 * matrix(intermediate, hidden) +
                       matrix(hidden, intermediate);
  return config.num_hidden_layers * layer + (tied_ ? 1 : 2) * matrix(config.vocab_size, hidden);
}

// What is no matrix is a norm's weight or a bias.
Tensor RandomTensors::get(const std::string& name, const std::vector<std::int64_t>& shape) {
  ones_.assign(static_cast<std::size_t>(shape[0]), 1.0f);
  return {name, DType::f32, shape, std::as_bytes(std::span(ones_))};
}

}  // namespace sbd
