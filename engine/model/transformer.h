// The transformer forward: one for all backends, architectures and decoders.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/batch.h"
#include "model/weights.h"

namespace sbd {

// Keys and values of one sequence. Positions [0, length) are committed; a forward writes behind
// them.
class KvCache {
 public:
  KvCache(Backend& backend, const ModelConfig& config, int n_ctx, DType dtype);

  int length() const { return length_; }
  int capacity() const { return capacity_; }
  void commit(int n_positions) { length_ += n_positions; }
  void truncate(int length) { length_ = length; }
  KvStorage* storage() const { return storage_.get(); }

 private:
  std::unique_ptr<KvStorage> storage_;
  int length_ = 0;
  int capacity_;
};

struct SequenceSegments {
  KvCache* kv;
  std::vector<Segment> segments;  // the first starts at kv->length()
};

struct Batch {
  std::vector<SequenceSegments> sequences;  // rows of several sequences share one forward
};

class Transformer {
 public:
  Transformer(const ModelConfig& config, TensorSource& source, Backend& backend);

  KvCache make_kv(int n_ctx, DType dtype) const;

  // Statistics of every wanted row, in the batch's order; commit segments have grown their caches.
  std::vector<RowStats> forward(const Batch& batch);

  // The same forward, but raw logits [wanted rows, vocab_size].
  std::vector<float> forward_logits(const Batch& batch);

 private:
  // Runs the layers over the batch's rows; outputs_ says which of them are wanted.
  void run_layers(const Batch& batch);
  Input head_input() const;
  // A layer's matmuls, on the buffers below.
  struct Matmuls {
    std::array<Linear, 3> qkv;
    std::array<Linear, 1> o;
    std::array<Linear, 2> gate_up;
    std::array<Linear, 1> down;
  };
  Matmuls matmuls(int layer) const;
  void gather_rows(const Batch& batch);
  static void commit(const Batch& batch);
  void reserve(std::size_t n_rows);

  ModelConfig config_;
  HeadShape heads_;
  Backend& backend_;
  ModelWeights weights_;

  // Rows of the forward at hand.
  std::vector<TokenId> tokens_;
  std::vector<int> positions_;
  std::vector<int> kv_end_;
  std::vector<SequenceRows> sequences_;
  std::vector<OutputRow> outputs_;

  // Activations [rows, .], grown to the largest forward seen.
  std::size_t reserved_rows_ = 0;
  Buffer residual_;   // [rows, H]
  Buffer q_, k_, v_;  // [rows, N D], [rows, G D], [rows, G D]
  Buffer attended_;   // [rows, N D]
  Buffer gate_, up_;  // [rows, I]
};

}  // namespace sbd
