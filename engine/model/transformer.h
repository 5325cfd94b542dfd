// The transformer forward: one for all backends, architectures and decoders.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "core/batch.h"
#include "core/input_squares.h"
#include "model/adapter.h"
#include "model/weights.h"

namespace sbd {

// Keys and values of one sequence. Positions [0, length) of a section of layers are committed; a
// forward writes behind them.
class KvCache {
 public:
  KvCache(Backend& backend, const ModelConfig& config, int capacity, DType dtype);

  int length() const { return std::ranges::min(lengths_); }
  const std::array<int, kLayerSections>& lengths() const { return lengths_; }
  void set_lengths(const std::array<int, kLayerSections>& lengths) { lengths_ = lengths; }
  // Forgets the positions from n on.
  void truncate(int n) {
    for (int& length : lengths_) length = std::min(length, n);
    storage_->truncate(std::ranges::max(lengths_));
  }
  // The first n positions of another sequence's.
  void copy(const KvCache& from, int n) {
    storage_->copy(*from.storage_, n);
    lengths_.fill(n);
  }
  int capacity() const { return capacity_; }
  KvStorage* storage() const { return storage_.get(); }

 private:
  std::unique_ptr<KvStorage> storage_;
  std::array<int, kLayerSections> lengths_{};
  int capacity_;
};

struct SequencePlan {
  KvCache* kv;
  Plan plan;
};

struct Batch {
  std::vector<SequencePlan> sequences;  // rows of several sequences share one forward
};

class Transformer {
 public:
  Transformer(const ModelConfig& config, TensorSource& source, Backend& backend);

  KvCache make_kv(int capacity, DType dtype) const;
  // Memory that n positions of such a cache take.
  std::size_t kv_bytes(int capacity, DType dtype, int n_positions) const;
  void set_adapter(const GgufFile& file);
  const Adapter& adapter() const { return adapter_; }

  // Rows of a forward at most, where one sequence does not need more: they bound the activations'
  // memory, and how long a cancellation waits. Very wide models have fewer.
  static int max_rows(const ModelConfig& config);
  // What the activations of so many rows take.
  static double activation_bytes(const ModelConfig& config, double n_rows);

  // Statistics of every wanted row, in the batch's order; commit segments have grown their caches.
  std::vector<RowStats> forward(const Batch& batch);

  // The same forward, but raw logits [wanted rows, vocab_size].
  std::vector<float> forward_logits(const Batch& batch);

  // Of every matrix of the layers, what it reads while `forwards` runs.
  std::vector<InputSquares> input_squares(const std::function<void()>& forwards);

 private:
  // The rows of one section of layers.
  struct Rows {
    std::vector<TokenId> tokens;
    std::vector<int> positions;
    std::vector<int> places;
    std::vector<int> kv_end;
    std::vector<Interval> unseen;
    bool branches = false;  // some places are not the positions, and something is unseen
    std::vector<SequenceRows> sequences;
    std::vector<Mix> mixes;         // what each row enters the section with, of those before
    std::vector<Interval> adapted;  // those that the adapter changes

    int size() const { return static_cast<int>(tokens.size()); }
    void clear();
    // Its keys go to `place` and it sees those before `end`, but for `hidden`.
    void add(TokenId token, int position, int place, int end, Interval hidden, bool with_adapter);
  };
  // Takes the batch's rows through the layers; head_input_ and outputs_ say where they arrive.
  void run_layers(const Batch& batch);
  void begin(const Rows& rows);
  // Layers [first, end) over x [rows, H], in place.
  void run(int first, int end, float* x);
  // What the batch's plans still have to say of their rows.
  void settle_rules(const Batch& batch);
  Input head_input() const;
  // A layer's matmuls, on the buffers below.
  struct Matmuls {
    std::array<Linear, 3> qkv;
    std::array<Linear, 1> o;
    std::array<Linear, 2> gate_up;
    std::array<Linear, 1> down;
  };
  Matmuls matmuls(int layer, float* x) const;
  void gather_rows(const Batch& batch);
  void gather_sequence(const SequencePlan& sequence);
  // What is looked up for a token of a segment.
  TokenId embedded(TokenId token, bool adapted) const;
  void commit(const Batch& batch);
  void reserve(std::size_t n_rows);

  ModelConfig config_;
  HeadShape heads_;
  Backend& backend_;
  ModelWeights weights_;
  Adapter adapter_;

  // The forward at hand.
  std::array<Rows, kLayerSections> rows_;
  bool uniform_ = true;  // every row goes through all layers, one after the other
  std::vector<std::array<int, kLayerSections>> kv_lengths_;  // of each sequence, behind the forward
  std::vector<OutputRow> outputs_;
  std::vector<float> query_scale_;  // of the rows at hand; empty: 1
  const float* head_input_ = nullptr;

  // Activations [rows, .], grown to the largest forward seen.
  std::size_t reserved_rows_ = 0;
  std::array<Buffer, kLayerSections> residual_;  // [rows, H]
  Buffer q_, k_, v_;                             // [rows, N D], [rows, G D], [rows, G D]
  Buffer attended_;                              // [rows, N D]
  Buffer gate_, up_;                             // [rows, I]
};

}  // namespace sbd
