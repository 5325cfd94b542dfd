// The CPU backend: operations split into tasks for a thread pool, inner loops from a kernel table.
#pragma once

#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/thread_pool.h"

namespace sbd::cpu {

template <typename T>
T* grown(std::vector<T>& buffer, Index n) {
  if (static_cast<Index>(buffer.size()) < n) buffer.resize(static_cast<std::size_t>(n));
  return buffer.data();
}

// Per layer and key-value head: keys [n_ctx / 16][head_dim / u][16][u], then values
// [n_ctx / u][padded_dim][u]. u, the interleave, is 1, or 2 where the kernels multiply bf16 in
// pairs. In Q8_0 both are CachedGroups [n_ctx / 16][head_dim / 32].
class CpuKv : public KvStorage {
 public:
  CpuKv(int n_layers, const HeadShape& heads, int n_ctx, DType dtype, int interleave);

  // What n positions take, however long the context.
  static std::size_t bytes(int n_layers, const HeadShape& heads, DType dtype, int n_positions);
  void copy(const KvStorage& from, int n_positions) override;

  DType dtype() const { return dtype_; }
  std::uint8_t* keys(int layer, int head) const;
  std::uint8_t* values(int layer, int head) const;
  int padded_dim() const { return padded_dim_; }
  int interleave() const { return interleave_; }

 private:
  std::uint8_t* plane(int index) const;  // keys and values of one head in one layer

  DType dtype_;
  int n_layers_;
  int n_heads_;
  int padded_dim_;
  int interleave_;
  Index key_bytes_;  // of a position
  Index value_bytes_;
  Index keys_bytes_;  // of one head
  Index values_bytes_;
  Pages pages_;
};

// Queries of one key-value head in a few rows of a sequence, which share every pass over its keys.
struct QueryTile {
  const CpuKv* kv;
  int kv_head;
  int first_row;
  int n_rows;
  int key_end;      // the most keys any of the rows sees
  int first_split;  // index of the first partial result
};

// Of a run of the vocabulary in a row that is scored.
struct RunScores {
  RunStats stats;
  int before;  // tokens more probable than the given one
};

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int n_threads);

  std::string description() const override;
  int n_threads() const override { return pool_.size(); }
  std::size_t free_memory() const override { return available_memory(); }
  Peaks measure_peaks() override;

  double weight_bytes(DType dtype, double rows, double cols) const override;
  std::unique_ptr<Weight> load_weight(const Tensor& tensor) override;
  std::unique_ptr<Weight> random_weight(DType dtype, int rows, int cols,
                                        std::uint64_t key) override;
  Buffer allocate(std::size_t n_floats) override;
  Buffer upload(std::span<const float> values) override;
  std::unique_ptr<KvStorage> allocate_kv(int n_layers, const HeadShape& heads, int n_ctx,
                                         DType dtype) override;
  std::size_t kv_bytes(int n_layers, const HeadShape& heads, int /*n_ctx*/, DType dtype,
                       int n_positions) const override {
    return CpuKv::bytes(n_layers, heads, dtype, n_positions);
  }

  void observe_inputs(InputObserver observer) override { observer_ = std::move(observer); }
  void begin(const ForwardRows& rows, std::span<const float> inverse_frequencies,
             bool rope_interleaved) override;
  void embed(const Weight& table, const float* mask, float* out) override;
  void mix(std::span<const Mix> rows, const float* x, const float* y, int cols,
           float* out) override;
  void linear(const Input& input, std::span<const Linear> linears, bool accumulate,
              std::span<const Linear> then) override;
  void rotate_and_cache(int layer, const HeadShape& heads, const float* q_norm, const float* k_norm,
                        float eps, float* q, float* k, const float* v) override;
  void attention(int layer, const HeadShape& heads, const float* q, float* out) override;
  void head_stats(const Input& input, const Weight& head, std::span<const OutputRow> outputs,
                  TokenId mask_token, std::span<RowStats> stats) override;
  void head_logits(const Input& input, const Weight& head, std::span<const OutputRow> outputs,
                   float* logits) override;

 private:
  int n_rows() const { return static_cast<int>(rows_.tokens.size()); }
  // The input's rows, or those of the outputs, in the forms that the weights' types need; they live
  // until the next call.
  Activations prepare(const Input& input, std::span<const Linear> linears,
                      std::span<const OutputRow> outputs = {});
  // A weight's product with some rows of its input.
  struct Product {
    Linear linear;
    Activations x;
    std::span<const Interval> rows;
    bool accumulate = false;
    float scale = 1;
  };
  void multiply(std::span<const Product> products, std::span<const Linear> then);
  void linear_adapted(const Input& input, std::span<const Linear> linears, bool accumulate,
                      std::span<const Linear> then);
  void prepare_low_rank();
  void head_stats_part(const Input& input, const Weight& head, std::span<const OutputRow> outputs,
                       TokenId mask_token, std::span<RowStats> stats);
  void place_rows(std::span<const OutputRow> outputs, Index vocab, Index n_runs);
  void attend(int layer, const HeadShape& heads, const float* q, float* out, Index partial_floats);

  ThreadPool pool_;
  const Kernels& kernels_;

  InputObserver observer_;
  ForwardRows rows_;
  bool rope_interleaved_ = false;
  std::vector<float> cos_;  // [rows][head_dim / 2]
  std::vector<float> sin_;

  Arena weight_memory_;

  // Scratch, grown to the largest forward seen.
  std::vector<float> values_;
  std::vector<std::uint16_t> bf16_;
  std::vector<QuantizedGroup> groups_;
  std::vector<Product> products_;
  std::vector<Linear> inputs_, low_rank_;  // of a matmul with adapters: what reads its input
  std::vector<float> low_rank_values_;     // [rows][rank] of each of them
  std::vector<QueryTile> query_tiles_;
  std::vector<int> split_tiles_;                 // per split: its tile
  std::vector<float> partials_;                  // of attention, one for each split
  Buffer attention_scratch_;                     // one for each thread
  Index attention_scratch_floats_ = 0;           // of one thread
  std::vector<RunStats> run_stats_;              // [vocabulary runs][rows]
  std::vector<std::vector<float>> tiles_;        // per thread: logits of one run
  std::vector<Index> kept_;                      // per row: where its logits are, or -1
  std::vector<Index> scored_;                    // per row: which of the scored ones, or -1
  Index n_best_ = 0;                             // the most of any row
  std::vector<RunScores> run_scores_;            // [scored rows][vocabulary runs]
  std::vector<TokenScore> best_;                 // [scored rows][vocabulary runs][best tokens]
  std::vector<float> token_logits_;              // [scored rows], of the token that is scored
  std::vector<std::vector<TokenId>> token_ids_;  // per thread: for sampling
  std::vector<float> logits_;                    // of the rows that are sampled
};

}  // namespace sbd::cpu
