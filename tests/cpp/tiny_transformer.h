// A tiny model of random tensors in memory, and a plain float64 forward of it that shares nothing
// with the engine's.
#pragma once

#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "core/types.h"
#include "format/model_config.h"
#include "model/weights.h"
#include "reference.h"

namespace sbd::test {

using Tokens = std::vector<TokenId>;
using Matrix = std::vector<double>;

inline constexpr int kVocab = 75;

// Rows of every matrix have whole blocks of the weights' type.
inline ModelConfig tiny_config(const std::string& architecture, DType dtype = DType::f32) {
  const bool long_rows = values_per_block(dtype) > kGroupSize;
  ModelConfig config;
  config.architecture = architecture;
  config.num_hidden_layers = 2;
  config.hidden_size = long_rows ? 256 : 64;
  config.intermediate_size = long_rows ? 512 : 96;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = long_rows ? 64 : 16;
  config.vocab_size = kVocab;
  config.max_position_embeddings = 4096;
  config.rms_norm_eps = 1e-5f;
  config.rope_theta = 10000;
  config.rope_interleaved = architecture == "llama";
  config.attention_bias = architecture == "qwen2";
  config.qk_norm = architecture == "qwen3";
  return config;
}

// Random tensors in memory, every one away from the value that would hide its operation.
class MemoryTensors : public TensorSource {
 public:
  // more_biases: on all four attention projections, as some Llama-shaped models have.
  MemoryTensors(const ModelConfig& config, DType dtype, bool tied, bool rope_freqs = false,
                bool more_biases = false)
      : random_(std::hash<std::string>{}(config.architecture)) {
    const int hidden = config.hidden_size;
    const int q = config.num_attention_heads * config.head_dim;
    const int kv = config.num_key_value_heads * config.head_dim;
    const auto matrix = [&](const std::string& name, int rows, int cols, double size) {
      tensors[name] = random_matrix(name, dtype, rows, cols, size, random_);
    };
    const auto vector = [&](const std::string& name, int n, double low, double high) {
      tensors[name] = f32_tensor(name, {n}, random_.floats(static_cast<std::size_t>(n), low, high));
    };
    const double size = 2 / std::sqrt(hidden);
    matrix("token_embd.weight", config.vocab_size, hidden, 0.5);
    if (!tied) matrix("output.weight", config.vocab_size, hidden, 0.5);
    vector("output_norm.weight", hidden, 0.5, 1.5);
    if (rope_freqs) vector("rope_freqs.weight", config.head_dim / 2, 1, 4);
    for (int i = 0; i < config.num_hidden_layers; ++i) {
      const std::string layer = "blk." + std::to_string(i) + ".";
      vector(layer + "attn_norm.weight", hidden, 0.5, 1.5);
      vector(layer + "ffn_norm.weight", hidden, 0.5, 1.5);
      matrix(layer + "attn_q.weight", q, hidden, size);
      matrix(layer + "attn_k.weight", kv, hidden, size);
      matrix(layer + "attn_v.weight", kv, hidden, size);
      matrix(layer + "attn_output.weight", hidden, q, size);
      matrix(layer + "ffn_gate.weight", config.intermediate_size, hidden, size);
      matrix(layer + "ffn_up.weight", config.intermediate_size, hidden, size);
      matrix(layer + "ffn_down.weight", hidden, config.intermediate_size, size);
      if (config.attention_bias || more_biases) {
        vector(layer + "attn_q.bias", q, -0.5, 0.5);
        vector(layer + "attn_k.bias", kv, -0.5, 0.5);
        vector(layer + "attn_v.bias", kv, -0.5, 0.5);
      }
      if (more_biases) vector(layer + "attn_output.bias", hidden, -0.5, 0.5);
      if (config.qk_norm) {
        vector(layer + "attn_q_norm.weight", config.head_dim, 0.5, 1.5);
        vector(layer + "attn_k_norm.weight", config.head_dim, 0.5, 1.5);
      }
    }
  }

  bool has(const std::string& name) override { return tensors.contains(name); }
  Tensor get(const std::string& name, const std::vector<std::int64_t>& shape) override {
    CHECK_IN(name, tensors.contains(name) && tensors.at(name).shape == shape);
    return tensors.at(name).view();
  }

  std::map<std::string, StoredTensor> tensors;

 private:
  Random random_;
};

// An adapter, by its tensors' names, and the rows that it changes.
struct Float64Adapter {
  const std::map<std::string, StoredTensor>& tensors;
  double alpha;
  std::vector<bool> rows;

  Matrix values(const std::string& name) const { return values_of(tensors.at(name)); }
};

// Of one row where sections of layers join: what it reads is a e + b h.
struct Coefficients {
  double a, b;
};

// The whole forward over one text in float64: row r sees the keys [0, kv_end[r]).
class Float64Model {
 public:
  Float64Model(const ModelConfig& config, const MemoryTensors& source) : c_(config) {
    for (const auto& [name, tensor] : source.tensors) weights_[name] = values_of(tensor);
  }

  // With coefficients of each row, layers are cut as config.layer_sections says: e leaves the first
  // section, h = the second of e, and the third reads a e + b h. A kMaskSlot is the adapter's mask.
  Matrix logits(const Tokens& tokens, const std::vector<int>& kv_end,
                const std::vector<Coefficients>& coefficients = {},
                const Float64Adapter* adapter = nullptr) const {
    const int n = static_cast<int>(tokens.size());
    const int hidden = c_.hidden_size;
    Matrix x;
    for (const TokenId token : tokens) {
      if (token == kMaskSlot) {
        const Matrix mask = adapter->values("sbd.draft.mask_embedding");
        x.insert(x.end(), mask.begin(), mask.end());
        continue;
      }
      const auto row = weights_.at("token_embd.weight").begin() + token * hidden;
      x.insert(x.end(), row, row + hidden);
    }
    const auto times = [&](const Matrix& rows, int cols, const std::string& name) {
      return this->times(rows, cols, name, adapter);
    };
    Matrix e;
    for (int i = 0; i < c_.num_hidden_layers; ++i) {
      if (i == c_.layer_sections[0]) e = x;
      for (std::size_t j = 0; i == c_.layer_sections[0] + c_.layer_sections[1] && j < x.size();
           ++j) {
        if (coefficients.empty()) break;
        const auto [a, b] = coefficients[j / static_cast<std::size_t>(hidden)];
        x[j] = a * e[j] + b * x[j];
      }
      const std::string layer = "blk." + std::to_string(i) + ".";
      const Matrix h = normed(x, layer + "attn_norm.weight", hidden);
      Matrix q = times(h, hidden, layer + "attn_q");
      Matrix k = times(h, hidden, layer + "attn_k");
      const Matrix v = times(h, hidden, layer + "attn_v");
      if (c_.qk_norm) {
        q = normed(q, layer + "attn_q_norm.weight", c_.head_dim);
        k = normed(k, layer + "attn_k_norm.weight", c_.head_dim);
      }
      rotate(q, n);
      rotate(k, n);
      add(x, times(attended(q, k, v, kv_end), c_.num_attention_heads * c_.head_dim,
                   layer + "attn_output"));
      const Matrix f = normed(x, layer + "ffn_norm.weight", hidden);
      Matrix gate = times(f, hidden, layer + "ffn_gate");
      const Matrix up = times(f, hidden, layer + "ffn_up");
      for (std::size_t j = 0; j < gate.size(); ++j) gate[j] *= up[j] / (1 + std::exp(-gate[j]));
      add(x, times(gate, c_.intermediate_size, layer + "ffn_down"));
    }
    const bool untied = weights_.contains("output.weight");
    return times(normed(x, "output_norm.weight", hidden), hidden, untied ? "output" : "token_embd");
  }

 private:
  Matrix normed(const Matrix& x, const std::string& name, int cols) const {
    const Matrix& weight = weights_.at(name);
    Matrix out(x.size());
    for (std::size_t row = 0; row < x.size(); row += cols) {
      double squares = 0;
      for (int i = 0; i < cols; ++i) squares += x[row + i] * x[row + i];
      for (int i = 0; i < cols; ++i) {
        out[row + i] = x[row + i] / std::sqrt(squares / cols + c_.rms_norm_eps) * weight[i];
      }
    }
    return out;
  }

  Matrix times(const Matrix& x, int cols, const std::string& name,
               const Float64Adapter* adapter) const {
    const Matrix& weight = weights_.at(name + ".weight");
    const auto bias = weights_.find(name + ".bias");
    Matrix out;
    for (std::size_t row = 0; row < x.size(); row += cols) {
      for (std::size_t feature = 0; feature * cols < weight.size(); ++feature) {
        double sum = bias == weights_.end() ? 0 : bias->second[feature];
        for (int i = 0; i < cols; ++i) sum += x[row + i] * weight[feature * cols + i];
        out.push_back(sum);
      }
    }
    if (adapter == nullptr || !adapter->tensors.contains(name + ".weight.lora_a")) return out;
    const Matrix a = adapter->values(name + ".weight.lora_a");
    const Matrix b = adapter->values(name + ".weight.lora_b");
    const std::size_t rank = a.size() / static_cast<std::size_t>(cols), features = b.size() / rank;
    for (std::size_t row = 0; row < adapter->rows.size(); ++row) {
      for (std::size_t r = 0; adapter->rows[row] && r < rank; ++r) {
        double low = 0;
        for (std::size_t i = 0; i < static_cast<std::size_t>(cols); ++i) {
          low += a[r * cols + i] * x[row * cols + i];
        }
        low *= adapter->alpha / static_cast<double>(rank);
        for (std::size_t f = 0; f < features; ++f) out[row * features + f] += low * b[f * rank + r];
      }
    }
    return out;
  }

  void rotate(Matrix& x, int n_rows) const {
    const int dim = c_.head_dim;
    const auto divisors = weights_.find("rope_freqs.weight");
    for (std::size_t at = 0; at < x.size(); at += dim) {
      const auto position = static_cast<double>(at / (x.size() / n_rows));
      for (int i = 0; i < dim / 2; ++i) {
        double frequency = std::pow(c_.rope_theta, -2.0 * i / dim) / c_.rope_linear_factor;
        if (divisors != weights_.end()) frequency /= divisors->second[i];
        double& a = x[at + (c_.rope_interleaved ? 2 * i : i)];
        double& b = x[at + (c_.rope_interleaved ? 2 * i + 1 : i + dim / 2)];
        const double angle = position * frequency;
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = turned;
      }
    }
  }

  Matrix attended(const Matrix& q, const Matrix& k, const Matrix& v,
                  const std::vector<int>& kv_end) const {
    const int dim = c_.head_dim;
    const int heads = c_.num_attention_heads;
    const int kv_heads = c_.num_key_value_heads;
    Matrix out(q.size(), 0.0);
    for (std::size_t row = 0; row < kv_end.size(); ++row) {
      for (int head = 0; head < heads; ++head) {
        const std::size_t at = (row * heads + head) * dim;
        const auto key_at = [&](int key) {
          return static_cast<std::size_t>((key * kv_heads + head / (heads / kv_heads)) * dim);
        };
        Matrix p;
        double sum = 0;
        for (int key = 0; key < kv_end[row]; ++key) {
          double score = 0;
          for (int d = 0; d < dim; ++d) score += q[at + d] * k[key_at(key) + d];
          p.push_back(std::exp(score / std::sqrt(dim)));
          sum += p.back();
        }
        for (int key = 0; key < kv_end[row]; ++key) {
          for (int d = 0; d < dim; ++d) out[at + d] += p[key] / sum * v[key_at(key) + d];
        }
      }
    }
    return out;
  }

  static void add(Matrix& x, const Matrix& y) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  ModelConfig c_;
  std::map<std::string, Matrix> weights_;
};

}  // namespace sbd::test
