// The CPU's inner loops, one table per instruction set. The same source (*_inl.h) is compiled once
// per table with other compiler flags and another 16-lane vector type (vec_*.h); these plain
// structs are all that crosses the border, so that no inline function is shared with baseline code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/types.h"

namespace sbd::cpu {

using Index = std::ptrdiff_t;  // offsets are computed in it: products of int counts overflow an int

inline constexpr int kLanes = 16;          // floats of a vector, keys per cached block
inline constexpr int kPanel = 32;          // output features per panel
inline constexpr int kKeysPerStep = 64;    // keys between two rescalings of the online softmax
inline constexpr int kKeysPerSplit = 512;  // keys of one attention task
// Finite, so that differences with it stay numbers; a power of two, whose products are exact.
inline constexpr float kMinusInfinity = -0x1p100f;

// Weights in panels of 32 output features, two strips of 16, inputs interleaved so that one load
// holds a step of a strip. A panel is one stream of memory, read from end to end:
//   f32, f16  [cols][2][16]
//   bf16      [cols / 2][2][16][2]
//   the quantised types: quant_layout.h
struct PackedMatrix {
  DType dtype;
  int rows;           // output features
  int cols;           // input features
  Index panel_bytes;  // a multiple of 64
  const std::uint8_t* data;
};

// 32 inputs of a row as int8: values = scale * quants. All that a group's products need lies
// together, so that a matmul tile follows one pointer a row.
struct QuantizedGroup {
  float scale;
  float minus_sum;             // of the values: what a weight's minimum is multiplied by
  std::int32_t minus_128_sum;  // of the quants: what q8_0's offset adds
  std::int32_t sums[2];        // of quants 0-15 and 16-31
  std::int8_t quants[32];
};

// Input rows in the forms the weights' types need; unused ones are null.
struct Activations {
  const float* values;           // [rows][cols], for f32 and f16 weights
  const std::uint16_t* bf16;     // [rows][cols rounded up to 2], for bf16
  const QuantizedGroup* groups;  // [rows][cols / 32], for the quantised types
  int first_row;                 // where the task's rows start in all of them
};

struct LinearTask {
  PackedMatrix weight;
  Activations x;
  int n_rows;
  const float* bias;  // [weight.rows] or null
  float* out;         // row 0 at the first feature of the first panel
  Index out_stride;
  bool accumulate;
  const std::uint8_t* next;  // what this thread will probably read after the panels
  float scale = 1;           // of the products
};

// 32 dimensions of 16 positions in a Q8_0 cache, as BlockQ8_0 has those of one. A position has a
// scale of its own in each group: what others hold is nothing to it.
struct CachedGroup {
  std::uint16_t scales[kLanes];             // IEEE halves
  std::int8_t quants[kGroupSize * kLanes];  // of keys [32][16 positions], of values [16][32]
};
static_assert(sizeof(CachedGroup) == kLanes * sizeof(BlockQ8_0));

// Queries of one key-value head in rows of one sequence against the keys [key_begin, key_end); a
// row sees those below its kv_end, but for what is unseen. Keys and values have u elements side by
// side in a lane, u being 1 for F32 and Kernels::short_interleave for F16 and BF16; Q8_0's are
// CachedGroups [n_ctx / 16][head_dim / 32].
struct AttentionTask {
  const float* queries;    // [n_rows][group][head_dim], rows row_stride apart
  const int* kv_end;       // [n_rows]
  const Interval* unseen;  // [n_rows], or nullptr: nothing
  Index row_stride;
  int n_rows;
  int group;
  int head_dim;
  int padded_dim;  // head_dim rounded up to 16
  DType kv_dtype;
  const void* keys;       // [n_ctx / 16][head_dim / u][16][u]
  const void* values;     // [n_ctx / u][padded_dim][u]
  const void* next_keys;  // what the thread is likely to read next: prefetched
  const void* next_values;
  int key_begin;  // a multiple of kKeysPerStep
  int key_end;
  float scale;
  // Results, as AttentionLayout says: of each query the sum_k 2^(s_k + shift) v_k, the shift and
  // the sum of 2^(s_k + shift), where s = scale q.k / ln(2) and shift = -max s
  float* partial;
  float* scratch;  // 64-byte aligned
};

// Where the numbers of n = n_rows * group queries lie, in floats, m being n rounded up to 16.
struct AttentionLayout {
  // In `partial`, behind the sums of values [n][padded_dim]:
  Index shifts;  // [m]
  Index sums;    // [m]
  Index partial_floats;
  // In `scratch`, behind a converted step of the cache [kKeysPerStep][padded_dim]:
  Index scores;     // [n][kKeysPerStep]
  Index factors;    // [m]
  Index step_sums;  // [m]
  Index kv_end;     // [m]
  Index queries;    // [n][head_dim]
  Index scratch_floats;
};

// A static function: every unit has its own.
static constexpr AttentionLayout attention_layout(Index n_queries, int head_dim, int padded_dim) {
  const auto padded = [](Index n) { return (n + kLanes - 1) / kLanes * kLanes; };
  const Index slots = padded(n_queries);
  AttentionLayout at{};
  at.shifts = n_queries * padded_dim;
  at.sums = at.shifts + slots;
  at.partial_floats = at.sums + slots;
  at.scores = Index{kKeysPerStep} * padded_dim;
  at.factors = at.scores + Index{kKeysPerStep} * n_queries;
  at.step_sums = at.factors + slots;
  at.kv_end = at.step_sums + slots;
  at.queries = at.kv_end + slots;
  at.scratch_floats = at.queries + padded(n_queries * head_dim);
  return at;
}

// Partial results of splits of kKeysPerSplit keys each, to one.
struct MergeTask {
  float* partials;  // as AttentionTask's, a split's partial_stride behind the last's; used up
  Index partial_stride;
  const int* kv_end;
  int n_rows;
  int group;
  int head_dim;
  int padded_dim;
  float* out;  // [n_rows][group][head_dim], rows row_stride apart
  Index row_stride;
};

// Softmax statistics of a run of logits.
struct RunStats {
  float max;
  float second;         // the next highest logit, equal to max where two share it
  float sum;            // of exp(l - max)
  float weighted_sum;   // of (l - max) exp(l - max)
  float not_finite;     // 0, or NaN where a logit is not a number or infinite
  std::int32_t argmax;  // lowest index
};

struct Kernels {
  const char* name;
  int short_interleave;  // 2 where an F16 or BF16 cache is multiplied as pairs of bf16, else 1
  void (*linear)(const LinearTask&, int panel_begin, int panel_end);
  void (*attention)(const AttentionTask&);
  void (*merge_attention)(const MergeTask&);
  // n is a multiple of 16.
  void (*run_stats)(const float* logits, int n, RunStats* stats);
  // Sum of exp((x - highest) * scale); n need not be a multiple of 16.
  float (*exp_sum)(const float* x, Index n, float highest, float scale);
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*swiglu)(const float* gate, const float* up, int n, float* out);
  // Pairs (i, i + dim / 2), or (2i, 2i + 1) where interleaved, turned by cos and sin [dim / 2].
  void (*rotate)(float* x, const float* cos, const float* sin, int dim, bool interleaved);
  void (*quantize)(const float* x, int n, QuantizedGroup* groups);
  void (*to_bf16)(const float* x, int n, std::uint16_t* out);
  void (*to_half)(const float* x, int n, std::uint16_t* out);
  // Reads n bytes (a multiple of 256) and returns something that depends on all.
  std::uint64_t (*peak_read)(const std::uint8_t* p, Index n);
  // Nothing but the dot instructions of f32, bf16 or q8_0 weights, so many rounds of them; returns
  // how many operations that were, a product and its sum being two.
  Index (*peak_dots)(DType dtype, Index rounds, float* total);
};

namespace scalar {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx2_vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

// The best table this CPU runs, or the one that the environment variable SBD_ISA names ("scalar",
// "avx2", "avx2_vnni", "avx512", "avx512_bf16", "neon"); a name that is unknown, or not supported
// here, is an error.
const Kernels& select_kernels();

// The tables this CPU runs, best first: the i-th, nullptr behind the last.
const Kernels* supported_kernels(int i);

}  // namespace sbd::cpu
