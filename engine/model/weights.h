// A model's weights in a backend's memory, and where they come from.
#pragma once

#include <cstddef>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "core/tensor.h"
#include "format/gguf.h"
#include "format/model_config.h"

namespace sbd {

using WeightPtr = std::unique_ptr<Weight>;

// H hidden_size, I intermediate_size, D head_dim, N attention heads, G key-value heads, V
// vocab_size
struct LayerWeights {
  Buffer attn_norm;               // [H]
  WeightPtr q, k, v;              // [N D, H], [G D, H], [G D, H]
  Buffer q_bias, k_bias, v_bias;  // [N D], [G D], [G D], or null
  Buffer q_norm, k_norm;          // [D], or null
  WeightPtr o;                    // [H, N D]
  Buffer o_bias;                  // [H], or null
  Buffer ffn_norm;                // [H]
  WeightPtr gate, up;             // [I, H]
  WeightPtr down;                 // [H, I]
};

struct ModelWeights {
  WeightPtr embedding;  // [V, H]
  std::vector<LayerWeights> layers;
  Buffer norm;                             // [H]
  WeightPtr output;                        // [V, H], or null: the embedding is the LM head
  std::vector<float> inverse_frequencies;  // RoPE's, [D / 2], with the model's scaling

  const Weight& head() const { return output ? *output : *embedding; }
};

// Gives tensors by name, one at a time: `get` ends the life of the tensor before.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual bool has(const std::string& name) = 0;
  // A tensor that is missing or has another shape is an error that names it.
  virtual Tensor get(const std::string& name, const std::vector<std::int64_t>& shape) = 0;
  // The tensor in the backend's memory.
  virtual WeightPtr matrix(const std::string& name, std::int64_t rows, std::int64_t cols,
                           Backend& backend);
};

ModelWeights load_weights(const ModelConfig& config, TensorSource& source, Backend& backend);

// A tensor of n finite floats.
std::vector<float> read_values(TensorSource& source, const std::string& name, std::int64_t n);

std::string shape_text(const std::vector<std::int64_t>& shape);

// The tensors of a model file, all of types that the engine can run. After loading, tensors that
// nothing asked for are an error: they would be operations this engine does not compute.
class FileTensors : public TensorSource {
 public:
  explicit FileTensors(const GgufFile& file);
  bool has(const std::string& name) override { return file_.find(name) != nullptr; }
  Tensor get(const std::string& name, const std::vector<std::int64_t>& shape) override;
  // `otherwise`: what such a tensor is.
  void check_all_used(
      std::string_view otherwise = "belongs to an architecture this engine does not compute") const;
  // What all of them take in the backend's memory.
  double bytes(const Backend& backend) const;

 private:
  const GgufFile& file_;
  std::unique_ptr<std::byte[]> data_;  // of the tensor at hand
  std::size_t n_data_ = 0;             // that it has room for
  std::set<const FileTensor*> used_;
};

// Weights of any shape, for timing: matrices are random, in `dtype`; vectors are ones.
class RandomTensors : public TensorSource {
 public:
  RandomTensors(DType dtype, bool tie_word_embeddings)
      : dtype_(dtype), tied_(tie_word_embeddings) {}
  bool has(const std::string& name) override { return name == "output.weight" && !tied_; }
  Tensor get(const std::string& name, const std::vector<std::int64_t>& shape) override;
  WeightPtr matrix(const std::string& name, std::int64_t rows, std::int64_t cols,
                   Backend& backend) override;
  // What a model of this shape takes in the backend's memory.
  double bytes(const ModelConfig& config, const Backend& backend) const;

 private:
  DType dtype_;
  bool tied_;
  std::vector<float> ones_;
};

}  // namespace sbd
