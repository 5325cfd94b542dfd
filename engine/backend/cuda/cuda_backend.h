// The CUDA backend: operations put kernels on a tape (tape.h), which runs when a result is wanted.
#pragma once

#include <set>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/attention.h"
#include "backend/cuda/head.h"
#include "backend/cuda/knobs.h"
#include "backend/cuda/kv.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/metadata.h"
#include "backend/cuda/packed_weight.h"
#include "backend/cuda/prepare.h"
#include "backend/cuda/tape.h"

namespace sbd::cuda {

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  std::string description() const override;
  int n_threads() const override { return 1; }
  std::size_t free_memory() const override;
  Peaks measure_peaks() override;
  ForwardProfile profile(const std::function<void()>& forward) override;
  std::vector<std::string> notes() const override;
  double weight_bytes(DType dtype, double rows, double cols) const override;

  std::unique_ptr<Weight> load_weight(const Tensor& tensor) override;
  std::unique_ptr<Weight> random_weight(DType dtype, int rows, int cols,
                                        std::uint64_t key) override;
  Buffer allocate(std::size_t n_floats) override;
  Buffer upload(std::span<const float> values) override;
  std::unique_ptr<KvStorage> allocate_kv(int n_layers, const HeadShape& heads, int n_ctx,
                                         DType dtype) override;
  std::size_t kv_bytes(int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
                       int n_positions) const override;

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
  void start() override;
  void head_stats(const Input& input, const Weight& head, std::span<const OutputRow> outputs,
                  TokenId mask_token, std::span<RowStats> stats) override;
  void head_logits(const Input& input, const Weight& head, std::span<const OutputRow> outputs,
                   float* logits) override;

  // A page for a cache, zeros where that is wanted, and pages that a cache leaves.
  DeviceMemory take_page(std::size_t bytes, bool cleared);
  void give_pages(std::vector<DeviceMemory> pages) noexcept;
  // Runs what is on the tape.
  void flush();
  // The same, and waits for it.
  void finish();
  // The same again, before memory is freed that the tape may use.
  void settle() noexcept;
  // Of a buffer, for tests.
  std::vector<float> download(const float* values, std::size_t n);
  cudaStream_t stream() const { return stream_; }
  int n_graph_replays() const { return graphs_.n_replays(); }

 private:
  // Device memory that operations share, grown to the largest forward seen.
  struct Scratch {
    const char* purpose;
    DeviceMemory memory = {};
  };
  // Input rows in the forms that weights' types need.
  struct Activations {
    const float* values;
    std::uint16_t* bf16;
    std::uint16_t* halves;
    float* step_sums;
  };

  int n_rows() const { return n_rows_; }
  void use_device() const;
  std::unique_ptr<Weight> pack(const Tensor& tensor);
  template <typename T>
  T* grown(Scratch& scratch, std::size_t n) {
    return static_cast<T*>(grown_bytes(scratch, n * sizeof(T)));
  }
  void* grown_bytes(Scratch& scratch, std::size_t bytes);
  // What allocate() gives, once more without the pool's pages where memory is too small.
  template <typename Allocate>
  DeviceMemory with_room(Allocate allocate) {
    try {
      return allocate();
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::memory) throw;
    }
    finish();
    pool_.release();
    return allocate();
  }
  Activations prepare(const Input& input, std::span<const Linear> linears, int n_rows,
                      const int* source_rows);
  void multiply(const Activations& x, std::span<const Linear> linears, int n_rows, bool accumulate,
                const HeadRuns& runs);
  // What adapters add, of an input that was prepared for them.
  void add_adapters(const Activations& x, std::span<const Linear> linears);
  // Adds the launch of what was gathered, and empties it.
  void launch_parts(DType dtype, LinearArgs& args);
  void multiply_type(DType dtype, const Activations& x, std::span<const Linear> linears, int n_rows,
                     bool accumulate, const HeadRuns& runs);
  // The head's product with the wanted rows, to its `out` and to `runs`, where they are not null;
  // `ranks`: those of given tokens too.
  void head(const Input& input, const Linear& head, std::span<const OutputRow> outputs,
            const HeadRuns& runs, bool ranks);
  void head_stats_part(const Input& input, const Weight& head, std::span<const OutputRow> outputs,
                       TokenId mask_token, std::span<RowStats> stats);
  const AskedRow* add_asks(std::span<const OutputRow> outputs, std::size_t n_runs, RowScore* scores,
                           TokenScore* best);
  float* room_for_logits(const Weight& head, std::size_t n_rows);

  int device_;
  Knobs knobs_;
  std::string name_;
  bool overlap_;  // a kernel may start before the last one's end
  DeviceShape shape_;
  cudaStream_t stream_ = nullptr;
  PagePool pool_;
  // Of weights that are not stored as they are in the file: their types, and bytes there and here.
  std::set<std::string_view> converted_;
  std::size_t converted_from_ = 0, converted_to_ = 0;
  Tape tape_;
  GraphCache graphs_;
  Tape* recorded_ = nullptr;  // gets what runs, where it is wanted
  Metadata metadata_;
  Metadata asks_;  // of an LM head's rows; of their own size, so that graphs keep their addresses

  // The rows at hand, on the host and on the device.
  int n_rows_ = 0;
  bool keep_graph_ = false;
  std::vector<SequenceRows> sequence_rows_;
  std::vector<int> kv_end_;
  std::vector<Mix> last_mixes_;
  const Mix* mixes_ = nullptr;
  const Mix* adapted_ = nullptr;  // once each adapted row, and no other; null: none is
  std::vector<QueryTileInfo> tile_infos_;
  const QueryTileInfo* tiles_ = nullptr;
  const TokenId* tokens_ = nullptr;
  const int* positions_ = nullptr;
  const int* places_ = nullptr;
  const int* row_sequence_ = nullptr;
  const int* row_kv_end_ = nullptr;
  const Interval* unseen_ = nullptr;
  const float* query_scale_ = nullptr;
  const float* frequencies_ = nullptr;
  const SequenceInfo* sequences_ = nullptr;
  PageTable page_table_{};
  const float* angle_table_ = nullptr;
  bool rope_interleaved_ = false;

  Scratch angles_{"RoPE's angles"};
  Scratch values_{"activations"};
  Scratch bf16_{"activations"};
  Scratch halves_{"activations"};
  Scratch half_scales_{"activations"};
  Scratch step_sums_{"activations"};
  Scratch linear_partials_{"partial sums"};
  Scratch linear_counters_{"partial sums"};
  Scratch low_rank_{"an adapter's products"};
  Scratch attention_partials_{"partial attention"};
  Scratch logits_{"logits"};
  Scratch head_runs_{"statistics"};
  Scratch head_highest_{"statistics"};
  Scratch head_results_{"statistics"};
  Scratch head_own_runs_{"scores"};
  Scratch head_run_best_{"scores"};
  Scratch head_unadjusted_{"scores"};
  PinnedMemory host_results_;
};

}  // namespace sbd::cuda
