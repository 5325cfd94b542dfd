// A plain forward in float64 that shares nothing with the engine's.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/types.h"
#include "format/model_config.h"
#include "reference.h"
#include "tiny_transformer.h"

namespace sbd::test {

using Matrix = std::vector<double>;

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
  Float64Model(const ModelConfig& config, const MemoryTensors& source);

  // With coefficients of each row, layers are cut as config.layer_sections says: e leaves the first
  // section, h = the second of e, and the third reads a e + b h. A kMaskSlot is the adapter's mask.
  Matrix logits(const Tokens& tokens, const std::vector<int>& kv_end,
                const std::vector<Coefficients>& coefficients = {},
                const Float64Adapter* adapter = nullptr) const;

 private:
  Matrix normed(const Matrix& x, const std::string& name, int cols) const;

  Matrix times(const Matrix& x, int cols, const std::string& name,
               const Float64Adapter* adapter) const;

  void rotate(Matrix& x, int n_rows) const;

  Matrix attended(const Matrix& q, const Matrix& k, const Matrix& v,
                  const std::vector<int>& kv_end) const;

  ModelConfig c_;
  std::map<std::string, Matrix> weights_;
};

}  // namespace sbd::test
