// The forward on tiny random models: against a plain float64 forward written here, and against
// itself, bit for bit, however its rows are cut into forwards.
#include "model/transformer.h"

#include <cmath>
#include <map>
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "reference.h"

namespace sbd {
namespace {

using namespace test;
using Tokens = std::vector<TokenId>;
using Matrix = std::vector<double>;

constexpr int kVocab = 75;

ModelConfig tiny_config(const std::string& architecture) {
  ModelConfig config;
  config.architecture = architecture;
  config.num_hidden_layers = 2;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 16;
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
  MemoryTensors(const ModelConfig& config, DType dtype, bool tied, bool rope_freqs = false)
      : random_(std::hash<std::string>{}(config.architecture)) {
    const int hidden = config.hidden_size;
    const int q = config.num_attention_heads * config.head_dim;
    const int kv = config.num_key_value_heads * config.head_dim;
    const auto matrix = [&](const std::string& name, int rows, int cols, double size) {
      tensors[name] = random_matrix(name, dtype, rows, cols, size, random_);
    };
    const auto vector = [&](const std::string& name, int n, double low, double high) {
      tensors[name] =
          f32_tensor(name, {n}, random_.floats(static_cast<std::size_t>(n), low, high));
    };
    matrix("token_embd.weight", config.vocab_size, hidden, 0.5);
    if (!tied) matrix("output.weight", config.vocab_size, hidden, 0.5);
    vector("output_norm.weight", hidden, 0.5, 1.5);
    if (rope_freqs) vector("rope_freqs.weight", config.head_dim / 2, 1, 4);
    for (int i = 0; i < config.num_hidden_layers; ++i) {
      const std::string layer = "blk." + std::to_string(i) + ".";
      vector(layer + "attn_norm.weight", hidden, 0.5, 1.5);
      vector(layer + "ffn_norm.weight", hidden, 0.5, 1.5);
      matrix(layer + "attn_q.weight", q, hidden, 0.25);
      matrix(layer + "attn_k.weight", kv, hidden, 0.25);
      matrix(layer + "attn_v.weight", kv, hidden, 0.25);
      matrix(layer + "attn_output.weight", hidden, q, 0.25);
      matrix(layer + "ffn_gate.weight", config.intermediate_size, hidden, 0.25);
      matrix(layer + "ffn_up.weight", config.intermediate_size, hidden, 0.25);
      matrix(layer + "ffn_down.weight", hidden, config.intermediate_size, 0.25);
      if (config.attention_bias) {
        vector(layer + "attn_q.bias", q, -0.5, 0.5);
        vector(layer + "attn_k.bias", kv, -0.5, 0.5);
        vector(layer + "attn_v.bias", kv, -0.5, 0.5);
      }
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

// The whole forward over one text in float64: row r sees the keys [0, kv_end[r]).
class Float64Model {
 public:
  Float64Model(const ModelConfig& config, const MemoryTensors& source) : c_(config) {
    for (const auto& [name, tensor] : source.tensors) weights_[name] = values_of(tensor);
  }

  Matrix logits(const Tokens& tokens, const std::vector<int>& kv_end) const {
    const int n = static_cast<int>(tokens.size());
    const int hidden = c_.hidden_size;
    Matrix x;
    for (const TokenId token : tokens) {
      const auto row = weights_.at("token_embd.weight").begin() + token * hidden;
      x.insert(x.end(), row, row + hidden);
    }
    for (int i = 0; i < c_.num_hidden_layers; ++i) {
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

  Matrix times(const Matrix& x, int cols, const std::string& name) const {
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

Tokens random_tokens(int n, std::uint64_t seed) {
  Random random(seed);
  Tokens tokens(static_cast<std::size_t>(n));
  for (TokenId& token : tokens) token = random.below(kVocab);
  return tokens;
}

// A segment whose rows are all wanted.
Segment segment(Tokens tokens, Attention attention = Attention::causal, Kv kv = Kv::commit) {
  Segment result{std::move(tokens), attention, kv, {}, {}};
  result.outputs.resize(result.tokens.size());
  std::iota(result.outputs.begin(), result.outputs.end(), 0);
  return result;
}

Tokens slice(const Tokens& tokens, int begin, int end) {
  return {tokens.begin() + begin, tokens.begin() + end};
}

double relative_error(const std::vector<float>& actual, const Matrix& expected) {
  if (actual.size() != expected.size()) return NAN;
  double difference = 0;
  double size = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i]);
    if (!(error <= difference)) difference = error;  // a NaN stays
    size = std::max(size, std::abs(expected[i]));
  }
  return difference / size;
}

struct Variant {
  std::string architecture;
  bool tied;
  bool rope_freqs;
  double rope_linear_factor;
};

const Variant kVariants[] = {{"llama", false, true, 1},
                             {"llama", true, false, 2.5},
                             {"qwen2", false, false, 1},
                             {"qwen3", true, false, 1}};

// 23 causal rows and a block of 9, in one forward.
TEST(transformer_agrees_with_float64) {
  const Tokens tokens = random_tokens(32, 1);
  std::vector<int> kv_end(32, 32);
  std::iota(kv_end.begin(), kv_end.begin() + 23, 1);
  for (const Variant& variant : kVariants) {
    ModelConfig config = tiny_config(variant.architecture);
    config.rope_linear_factor = variant.rope_linear_factor;
    for (const DType dtype : kAllTypes) {
      MemoryTensors source(config, dtype, variant.tied, variant.rope_freqs);
      const Matrix expected = Float64Model(config, source).logits(tokens, kv_end);
      for (const cpu::Kernels* kernels : all_kernels()) {
        const ForcedIsa forced(kernels->name);
        cpu::CpuBackend backend(2);
        Transformer model(config, source, backend);
        for (const DType kv_dtype : {DType::f32, DType::f16}) {
          KvCache kv = model.make_kv(40, kv_dtype);
          const auto logits = model.forward_logits(
              {{{&kv, {segment(slice(tokens, 0, 23)),
                       segment(slice(tokens, 23, 32), Attention::block, Kv::scratch)}}}});
          CHECK_EQ(kv.length(), 23);
          // Exact weights and activations: float32's own error. Activations rounded to bf16 are off
          // by 2^-8 each, to int8 by 1/254 of their group's largest; an F16 cache by 2^-11.
          double tolerance = 1e-4;
          if (kv_dtype == DType::f16) tolerance = 2e-3;
          if (dtype == DType::bf16) tolerance = 2e-2;
          if (values_per_block(dtype) > 1) tolerance = 4e-2;
          const double error = relative_error(logits, expected);
          CHECK_IN(std::string(kernels->name) + ", " + variant.architecture + ", weights " +
                       std::string(name(dtype)) + ", kv " + std::string(name(kv_dtype)) + ": " +
                       show(error),
                   error <= tolerance);
        }
      }
    }
  }
  CHECK(std::isnan(relative_error({1.0f, NAN, 2.0f}, {1, 1, 2})));
}

class ForwardPaths {
 public:
  ForwardPaths(const std::string& architecture, DType dtype, DType kv_dtype, int n_threads)
      : config_(tiny_config(architecture)),
        source_(config_, dtype, /*tied=*/false),
        backend_(n_threads),
        model_(config_, source_, backend_),
        kv_dtype_(kv_dtype) {}

  KvCache cache() const { return model_.make_kv(80, kv_dtype_); }
  std::vector<float> run(KvCache& kv, std::vector<Segment> segments) {
    return model_.forward_logits({{{&kv, std::move(segments)}}});
  }
  Transformer& model() { return model_; }

 private:
  ModelConfig config_;
  MemoryTensors source_;
  cpu::CpuBackend backend_;
  Transformer model_;
  DType kv_dtype_;
};

void append(std::vector<float>& all, const std::vector<float>& some) {
  all.insert(all.end(), some.begin(), some.end());
}

bool identical(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

TEST(transformer_rows_are_the_same_bits_however_they_are_computed) {
  const Tokens text = random_tokens(40, 2);
  const Tokens other = random_tokens(30, 3);
  const Tokens block = random_tokens(7, 4);
  const char* architectures[] = {"llama", "qwen2", "qwen3"};
  int round = 0;
  for (const cpu::Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    for (const DType dtype : kAllTypes) {
      const DType kv_dtype = round % 2 ? DType::f32 : DType::f16;
      const std::string architecture = architectures[round++ % 3];
      const std::string where = std::string(kernels->name) + ", " + std::string(name(dtype));
      std::vector<float> whole, blocked;  // logits of the text and of the block behind it
      for (const int n_threads : {1, 2, 3, 5}) {
        ForwardPaths paths(architecture, dtype, kv_dtype, n_threads);
        KvCache kv = paths.cache();
        const auto at_once = paths.run(kv, {segment(text)});
        const auto denoised = paths.run(kv, {segment(block, Attention::block, Kv::scratch)});
        if (whole.empty()) whole = at_once, blocked = denoised;
        CHECK_IN(where, identical(at_once, whole) && identical(denoised, blocked));
      }

      ForwardPaths paths(architecture, dtype, kv_dtype, 2);
      for (const int chunk : {1, 7, 16}) {
        KvCache kv = paths.cache();
        std::vector<float> chunks;
        for (int begin = 0; begin < 40; begin += chunk) {
          const int end = std::min(begin + chunk, 40);
          append(chunks, paths.run(kv, {segment(slice(text, begin, end))}));
        }
        CHECK_EQ(kv.length(), 40);
        CHECK_IN(where + ", chunks of " + std::to_string(chunk), identical(chunks, whole));
        CHECK(identical(paths.run(kv, {segment(block, Attention::block, Kv::scratch)}), blocked));
      }

      // Two commits and a block in one forward; scratch blocks in between leave no trace.
      KvCache kv = paths.cache();
      std::vector<float> fused;
      append(fused, paths.run(kv, {segment(slice(text, 0, 12))}));
      for (int i = 0; i < 3; ++i) {
        paths.run(kv, {segment(random_tokens(16 + i, 5), Attention::block, Kv::scratch)});
      }
      CHECK_EQ(kv.length(), 12);
      append(fused, paths.run(kv, {segment(slice(text, 12, 20)), segment(slice(text, 20, 40)),
                                   segment(block, Attention::block, Kv::scratch)}));
      std::vector<float> text_and_block = whole;
      append(text_and_block, blocked);
      CHECK_IN(where + ", fused", identical(fused, text_and_block));

      // Rolled back and forward again.
      kv.truncate(15);
      CHECK(identical(paths.run(kv, {segment(slice(text, 15, 40))}),
                      {whole.begin() + 15 * kVocab, whole.end()}));

      // In a batch with another sequence, before it and behind it.
      KvCache first = paths.cache(), second = paths.cache(), third = paths.cache();
      const auto batch = paths.model().forward_logits(
          {{{&first, {segment(other)}}, {&second, {segment(text)}}, {&third, {segment(other)}}}});
      CHECK_IN(where + ", batch",
               identical({batch.begin() + 30 * kVocab, batch.begin() + 70 * kVocab}, whole));
      CHECK(identical({batch.begin(), batch.begin() + 30 * kVocab},
                      {batch.begin() + 70 * kVocab, batch.end()}));

      // Only some rows wanted.
      KvCache some_kv = paths.cache();
      Segment some = segment(text);
      some.outputs = {3, 20, 39};
      std::vector<float> rows;
      for (const int row : some.outputs) {
        rows.insert(rows.end(), whole.begin() + row * kVocab, whole.begin() + (row + 1) * kVocab);
      }
      CHECK_IN(where + ", some rows", identical(paths.run(some_kv, {some}), rows));
    }
  }
}

TEST(transformer_statistics_are_those_of_its_logits) {
  ModelConfig config = tiny_config("qwen3");
  config.mask_token_id = 9;
  MemoryTensors source(config, DType::f32, true);
  cpu::CpuBackend backend(2);
  Transformer model(config, source, backend);
  const Tokens text = random_tokens(20, 6);
  KvCache a = model.make_kv(32, DType::f16), b = model.make_kv(32, DType::f16);
  const auto logits = model.forward_logits({{{&a, {segment(text)}}}});
  const auto stats = model.forward({{{&b, {segment(text)}}}});
  CHECK_EQ(stats.size(), 20u);
  for (std::size_t row = 0; row < stats.size(); ++row) {
    const float* l = logits.data() + row * kVocab;
    TokenId argmax = 0;
    double sum = 0;
    for (TokenId id = 0; id < kVocab; ++id) {
      if (id == 9) continue;
      if (l[id] > l[argmax]) argmax = id;
      sum += std::exp(static_cast<double>(l[id]));
    }
    CHECK_EQ(stats[row].argmax, argmax);
    CHECK_NEAR(stats[row].log_z, std::log(sum), 1e-5);
    CHECK_NEAR(stats[row].top_probability, std::exp(l[argmax]) / sum, 1e-6);
  }
  // A forward that wants nothing only fills the cache.
  Segment prompt = segment(text);
  prompt.outputs.clear();
  KvCache c = model.make_kv(32, DType::f16);
  CHECK(model.forward({{{&c, {prompt}}}}).empty());
  CHECK_EQ(c.length(), 20);
}

TEST(transformer_refuses_what_it_cannot_compute) {
  const ModelConfig config = tiny_config("llama");
  MemoryTensors source(config, DType::f32, true);
  cpu::CpuBackend backend(1);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(10, DType::f16);
  const auto run = [&](std::vector<Segment> segments) {
    return model.forward({{{&kv, std::move(segments)}}});
  };
  run({segment(random_tokens(6, 1))});
  CHECK_THROWS_WITH(run({segment(random_tokens(5, 1))}),
                    "the KV cache holds 10 positions, but 11 are needed: raise n_ctx");
  CHECK_THROWS_WITH(
      run({segment({1}), segment(random_tokens(4, 1), Attention::block, Kv::scratch)}),
      "the KV cache holds 10 positions, but 11 are needed");
  CHECK_THROWS_WITH(run({segment({1, kVocab})}), "token id 75 is outside the vocabulary of 75");
  CHECK_THROWS_WITH(run({segment({-1})}), "token id -1 is outside the vocabulary of 75");
  CHECK_THROWS_WITH(run({segment({1}, Attention::block, Kv::scratch), segment({2})}),
                    "a committed segment cannot follow a scratch one");
  CHECK_EQ(kv.length(), 6);  // a refused forward leaves the cache as it was
  CHECK_EQ(run({segment(random_tokens(4, 1))}).size(), 4u);  // and the last position is usable
  CHECK_EQ(kv.length(), 10);
}

TEST(transformer_weights_that_are_not_finite_are_named) {
  const ModelConfig config = tiny_config("qwen2");
  for (const char* name : {"token_embd.weight", "blk.1.attn_norm.weight", "blk.0.attn_k.bias",
                           "blk.1.ffn_down.weight", "output_norm.weight"}) {
    MemoryTensors source(config, DType::f32, true);
    const float nan = NAN;
    std::memcpy(source.tensors.at(name).bytes.data() + 4 * 33 % source.tensors.at(name).bytes.size(),
                &nan, sizeof nan);
    cpu::CpuBackend backend(1);
    CHECK_THROWS_WITH(Transformer(config, source, backend), std::string("tensor ") + name);
    CHECK_THROWS_WITH(Transformer(config, source, backend), "NaN or infinity");
  }
}

// Values beyond a half in an F16 cache: an error that says so, for every weight type.
TEST(transformer_overflow_of_the_cache_is_an_error) {
  for (const cpu::Kernels* kernels : all_kernels()) {
    const ForcedIsa forced(kernels->name);
    for (const char* bias : {"blk.0.attn_v.bias", "blk.0.attn_k.bias"}) {
      for (const DType dtype : kAllTypes) {
        const ModelConfig config = tiny_config("qwen2");
        MemoryTensors source(config, dtype, true);
        const float huge = 1e6f;
        std::memcpy(source.tensors.at(bias).bytes.data() + 4 * 5, &huge, sizeof huge);
        cpu::CpuBackend backend(1);
        Transformer model(config, source, backend);
        KvCache half = model.make_kv(10, DType::f16), single = model.make_kv(10, DType::f32);
        CHECK_THROWS_WITH(model.forward({{{&half, {segment(random_tokens(8, 1))}}}}),
                          "values exceed an F16 KV cache (then kv_dtype f32 helps)");
        CHECK_EQ(model.forward({{{&single, {segment(random_tokens(8, 1))}}}}).size(), 8u);
      }
    }
  }
}

}  // namespace
}  // namespace sbd
