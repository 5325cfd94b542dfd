// Keys and values into the cache, and attention over it.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/tape.h"
#include "backend/cuda/units.h"

namespace sbd::cuda {

inline constexpr int kMaxHeadDim = 256;

// The cache of a sequence is pages of kPagePositions positions, the last page of n_ctx as well, or
// one page of n_ctx where that is less. A page: [layers][keys, values][kv_heads][capacity][stride]
// in F16, BF16 or F32, stride being head_dim in whole 16 bytes, zeros behind head_dim.
inline constexpr int kPagePositions = 1024;
struct SequenceInfo {
  int capacity;  // positions of a page
  int first_row;
};

// Where the pages of a forward's sequences are: [sequences][pitch], the pitch being what the
// longest n_ctx needs, so that growing caches change no argument of a kernel.
struct PageTable {
  std::uint8_t* const* pages;
  int pitch;
  __host__ __device__ std::uint8_t* page(int sequence, int position) const {
    return pages[Index{sequence} * pitch + position / kPagePositions];
  }
  bool operator==(const PageTable&) const = default;
};

// Queries of one sequence that a block works on: those of its rows, GQA-packed (query i of a
// key-value head is head i % group of row i / group).
struct QueryTileInfo {
  int sequence;
  int first_query;
  int n_queries;
  int key_end;  // the most keys any of them sees
};

struct CacheArgs {  // rotate_and_cache
  PageTable table;
  const SequenceInfo* sequences;
  const int* row_sequence;   // [rows]
  const int* places;         // [rows], in the cache
  const float* query_scale;  // [rows], or null
  const float* angles;       // [rows][head_dim / 2] cosine, sine
  const float* q_norm;       // [head_dim], or null
  const float* k_norm;       // likewise
  float* q;                  // [rows, heads * head_dim]
  const float* k;            // [rows, kv_heads * head_dim]
  const float* v;
  float eps;
  int layer;
  int n_rows;
  int heads;
  int kv_heads;
  int head_dim;
  int stride;
  DType kv_dtype;
  int interleaved;
  bool operator==(const CacheArgs&) const = default;
};
void rotate_and_cache(Tape& tape, const CacheArgs& args);

// angles [rows][n_frequencies] of cosine and sine of position * frequency
struct AnglesArgs {
  const int* positions;
  const float* frequencies;
  float* angles;
  int n_frequencies;
  int n_angles;
  bool operator==(const AnglesArgs&) const = default;
};
void angles(Tape& tape, const AnglesArgs& args);

// A query's share of a split: [padded dim] of sum 2^(s - m) v, then m and the sum of 2^(s - m),
// s = q.k / sqrt(head_dim) / ln(2).
__host__ __device__ constexpr int partial_floats(int padded_dim) { return padded_dim + 2; }

struct AttentionArgs {
  PageTable table;
  const SequenceInfo* sequences;
  const QueryTileInfo* tiles;
  const int* row_sequence;  // [rows]
  const int* kv_end;        // [rows]
  const Interval* unseen;   // [rows], of what is before kv_end; or null
  const float* q;           // [rows, heads * head_dim]
  float* out;               // likewise
  float* partials;          // [splits][rows of this launch][heads][partial_floats]
  int first_tile;
  int n_tiles;
  int first_row;  // of the launch
  int n_rows;
  int n_splits;  // at least what the longest row needs
  int layer;
  int heads;
  int kv_heads;
  int head_dim;
  int stride;
  DType kv_dtype;
  bool operator==(const AttentionArgs&) const = default;
};
// cache_bytes: that it reads, for profiles.
void attention(Tape& tape, const AttentionArgs& args, double cache_bytes);

// Keys are cut at fixed places, whatever rows or sequences share the forward, so that a row's
// result is always summed in the same order: in pieces of 64 up to 2048 keys, so that one row of a
// short context is work for many blocks, then of 1024, so that the partial results of a long one
// stay few. A split lies in one page.
inline constexpr int kShortSplit = 64;
inline constexpr int kLongSplit = 1024;
inline constexpr int kShortSplits = 32;
inline constexpr int kShortKeys = kShortSplit * kShortSplits;
static_assert(kPagePositions % kShortSplit == 0 && kPagePositions % kLongSplit == 0 &&
              kShortKeys % kLongSplit == 0);

__host__ __device__ constexpr int splits_of(int keys) {
  return keys <= kShortKeys ? ceil_div(keys, kShortSplit)
                            : kShortSplits + ceil_div(keys - kShortKeys, kLongSplit);
}
__host__ __device__ constexpr int split_begin(int split) {
  return split <= kShortSplits ? split * kShortSplit
                               : kShortKeys + (split - kShortSplits) * kLongSplit;
}

inline constexpr int kTileQueries = 64;

}  // namespace sbd::cuda
