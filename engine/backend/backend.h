// The operations a transformer forward needs, on memory that belongs to the backend. The forward
// (model/transformer.cpp) is written once against this interface; a backend decides about layouts,
// threads and kernels. Activations are float32, row-major.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/peaks.h"
#include "core/profile.h"
#include "core/tensor.h"
#include "core/types.h"

namespace sbd {

// A weight matrix [rows = out_features, cols = in_features] in the backend's own layout.
class Weight {
 public:
  Weight(DType dtype, int rows, int cols) : dtype_(dtype), rows_(rows), cols_(cols) {}
  virtual ~Weight() = default;
  DType dtype() const { return dtype_; }
  int rows() const { return rows_; }
  int cols() const { return cols_; }

 private:
  DType dtype_;
  int rows_;
  int cols_;
};

// Keys and values of one sequence, all layers, room for n_ctx positions; pages are touched lazily.
class KvStorage {
 public:
  virtual ~KvStorage() = default;
  // Takes over the first n positions of another of the same shape and type.
  virtual void copy(const KvStorage& from, int n_positions) = 0;
  // What lies behind the first n positions is of no more use: its memory may go.
  virtual void truncate(int /*n_positions*/) {}
};

using Buffer = std::shared_ptr<float>;  // floats in the backend's memory

struct HeadShape {
  int num_attention_heads;
  int num_key_value_heads;
  int head_dim;
};

// The rows of one sequence are consecutive in a forward, and so are their places in its cache.
struct SequenceRows {
  KvStorage* kv;
  int first_row;
  int n_rows;
};

struct ForwardRows {
  std::span<const TokenId> tokens;  // [rows]
  std::span<const int> positions;   // [rows], absolute in the row's sequence
  std::span<const int> kv_end;      // [rows], keys the row sees: places [0, kv_end)
  std::span<const SequenceRows> sequences;
  std::span<const float> query_scale = {};  // [rows], on the rotated queries; none where empty
  std::span<const Interval> adapted = {};   // rows that adapters change, ascending
  // Where rows go on from within those before them; else empty.
  std::span<const int> places = {};  // [rows], where in the cache its keys go, if not its position
  std::span<const Interval> unseen = {};  // [rows], places below kv_end that the row does not see
};

// What a matmul reads: rows x [*, cols], as they are, or first through one of
//   RMSNorm with norm_weight [cols] and eps, where norm_weight is given;
//   SwiGLU, silu(x) * up, where up [*, cols] is given.
struct Input {
  const float* x;
  const float* norm_weight = nullptr;
  float eps = 0;
  const float* up = nullptr;
};

// What an adapter adds to a matmul: scale input a^T b^T.
struct LowRank {
  const Weight* a = nullptr;  // [rank, weight.cols]; nullptr: nothing
  const Weight* b = nullptr;  // [weight.rows, rank]
  float scale = 0;
};

// out [rows, weight.rows] (+)= input [rows, weight.cols] weight^T + bias
struct Linear {
  const Weight* weight;
  const float* bias;  // [weight.rows] or nullptr
  float* out;
  LowRank adapter = {};  // in the rows that are adapted
};

// Hears what matmuls of the layers read: x [n_rows, cols] of all these weights.
using InputObserver =
    std::function<void(std::span<const Linear> linears, const float* x, int n_rows)>;

// A row whose statistics are wanted.
struct OutputRow {
  int row;
  int position;  // whose noise draws: the one before what the row decides
  Sampling sampling;
  RowAsk ask = {};
};

// A row that enters a section of layers: a x[x_row] + b y[y_row], of the outputs of two before. A
// coefficient of 0 leaves its input unread.
struct Mix {
  int x_row;
  float a;
  int y_row;
  float b;
};

// The entropy of a row whose logits were not all finite is NaN.
inline void check_finite(std::span<const RowStats> stats) {
  for (const RowStats& row : stats) {
    SBD_CHECK(!std::isnan(row.entropy),
              "the model computed logits that are NaN or infinite: its weights are damaged, or its "
              "values exceed an F16 or Q8_0 KV cache (then kv_dtype bf16 or f32 helps)");
  }
}

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string description() const = 0;  // such as "cpu (avx512_bf16)"
  virtual int n_threads() const = 0;
  virtual std::size_t free_memory() const = 0;  // bytes that caches could take
  virtual Peaks measure_peaks() = 0;
  // Of `forward`, which runs one; it is run more than once.
  virtual ForwardProfile profile(const std::function<void()>& /*forward*/) {
    fail(ErrorKind::value, "profile: expected a device that runs kernels (cuda), got {}",
         description());
  }
  // Tells `observer` of all forwards until it is another; an empty one hears nothing.
  virtual void observe_inputs(InputObserver /*observer*/) {
    fail(ErrorKind::value,
         "importance: expected a device that shows what matmuls read (cpu), got {}", description());
  }
  // What is to be known of the weights that were loaded, a line each.
  virtual std::vector<std::string> notes() const { return {}; }

  // What a weight takes in the backend's memory, or a little less.
  virtual double weight_bytes(DType dtype, double rows, double cols) const {
    return rows * cols / values_per_block(dtype) * static_cast<double>(bytes_per_block(dtype));
  }

  // Memory. A weight that holds NaN or infinity is an error that names the tensor.
  virtual std::unique_ptr<Weight> load_weight(const Tensor& tensor) = 0;
  // A weight of random_block()s, in whole blocks, made in the backend's memory.
  virtual std::unique_ptr<Weight> random_weight(DType dtype, int rows, int cols,
                                                std::uint64_t key) = 0;
  virtual Buffer allocate(std::size_t n_floats) = 0;
  virtual Buffer upload(std::span<const float> values) = 0;
  virtual std::unique_ptr<KvStorage> allocate_kv(int n_layers, const HeadShape& heads, int n_ctx,
                                                 DType dtype) = 0;
  // Memory that n positions of such a cache take.
  virtual std::size_t kv_bytes(int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
                               int n_positions) const = 0;

  // Starts a forward: the operations below work on these rows until the next begin(). The rows'
  // memory stays valid as long. inverse_frequencies: RoPE's, [head_dim / 2].
  virtual void begin(const ForwardRows& rows, std::span<const float> inverse_frequencies,
                     bool rope_interleaved) = 0;
  // out [rows, weight.cols] = the rows' token embeddings; that of kMaskSlot is `mask`.
  virtual void embed(const Weight& table, const float* mask, float* out) = 0;
  // out [rows, cols] = a x + b y, by row
  virtual void mix(std::span<const Mix> rows, const float* x, const float* y, int cols,
                   float* out) = 0;
  // Several weights on the same input; accumulate: out += instead of out =. `then`: the weights
  // that the next matmul reads, which may be fetched ahead.
  virtual void linear(const Input& input, std::span<const Linear> linears, bool accumulate,
                      std::span<const Linear> then) = 0;
  // RMSNorm of each head (where the norms are not nullptr), RoPE, keys and values into the cache.
  // q [rows, heads * head_dim] in place; k, v [rows, kv_heads * head_dim]
  virtual void rotate_and_cache(int layer, const HeadShape& heads, const float* q_norm,
                                const float* k_norm, float eps, float* q, float* k,
                                const float* v) = 0;
  // out [rows, heads * head_dim] = softmax(q K^T / sqrt(head_dim)) V over the keys each row sees
  virtual void attention(int layer, const HeadShape& heads, const float* q, float* out) = 0;
  // What was asked for may begin: the caller has something else to do first.
  virtual void start() {}
  // Statistics of the output rows times the LM head, in one pass over the vocabulary; the mask
  // token (-1: none) is left out.
  virtual void head_stats(const Input& input, const Weight& head,
                          std::span<const OutputRow> outputs, TokenId mask_token,
                          std::span<RowStats> stats) = 0;
  // Host logits [outputs.size(), head.rows] as computed.
  virtual void head_logits(const Input& input, const Weight& head,
                           std::span<const OutputRow> outputs, float* logits) = 0;
};

}  // namespace sbd
