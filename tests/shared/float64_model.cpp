#include "float64_model.h"

#include <cmath>

namespace sbd::test {

namespace {

void add(Matrix& x, const Matrix& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

}  // namespace

Float64Model::Float64Model(const ModelConfig& config, const MemoryTensors& source) : c_(config) {
  for (const auto& [name, tensor] : source.tensors) weights_[name] = values_of(tensor);
}

Matrix Float64Model::logits(const Tokens& tokens, const std::vector<int>& kv_end,
                            const std::vector<Coefficients>& coefficients,
                            const Float64Adapter* adapter) const {
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
    for (std::size_t j = 0; i == c_.layer_sections[0] + c_.layer_sections[1] && j < x.size(); ++j) {
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

Matrix Float64Model::normed(const Matrix& x, const std::string& name, int cols) const {
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

Matrix Float64Model::times(const Matrix& x, int cols, const std::string& name,
                           const Float64Adapter* adapter) const {
  const Matrix& weight = weights_.at(name + ".weight");
  const auto bias = weights_.find(name + ".bias");
  Matrix out;
  for (std::size_t row = 0; row < x.size(); row += cols) {
    const double* in = x.data() + row;
    for (std::size_t feature = 0; feature * cols < weight.size(); ++feature) {
      double sum = bias == weights_.end() ? 0 : bias->second[feature];
      const double* w = weight.data() + feature * cols;
      for (int i = 0; i < cols; ++i) sum += in[i] * w[i];
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

void Float64Model::rotate(Matrix& x, int n_rows) const {
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

Matrix Float64Model::attended(const Matrix& q, const Matrix& k, const Matrix& v,
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

}  // namespace sbd::test
