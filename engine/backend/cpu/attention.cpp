// CpuBackend: keys and values into the cache, and attention over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/cpu_backend.h"

namespace sbd::cpu {

namespace {

// Keys per task. Fixed, as the split decides how partial results are added up.
constexpr int kSplit = 1024;

// Partial results that are kept at a time: 32 MiB, or one tile's where that is more.
constexpr Index kPartialFloats = 8 << 20;

int n_splits(int key_end) { return (key_end + kSplit - 1) / kSplit; }

// value[i] to out[i * stride], in the cache's type
template <typename Convert>
void store_kv(const CpuKv& kv, std::uint8_t* base, Index at, Index stride, const float* value,
              int n, Convert to_half) {
  if (kv.dtype() == DType::f32) {
    float* out = reinterpret_cast<float*>(base) + at;
    for (int i = 0; i < n; ++i) out[i * stride] = value[i];
    return;
  }
  auto* out = reinterpret_cast<std::uint16_t*>(base) + at;
  std::uint16_t half[kLanes];
  for (int i = 0; i < n; i += kLanes) {
    const int count = std::min(kLanes, n - i);
    to_half(value + i, count, half);
    for (int j = 0; j < count; ++j) out[(i + j) * stride] = half[j];
  }
}

}  // namespace

void CpuBackend::rotate_and_cache(int layer, const HeadShape& heads, const float* q_norm,
                                  const float* k_norm, float eps, float* q, float* k,
                                  const float* v) {
  const Index dim = heads.head_dim;
  const int kv_heads = heads.num_key_value_heads;
  const int group = heads.num_attention_heads / kv_heads;
  for (const SequenceRows& sequence : rows_.sequences) {
    const auto& kv = static_cast<const CpuKv&>(*sequence.kv);
    pool_.run(sequence.n_rows * kv_heads, [&](int task, int) {
      const int row = sequence.first_row + task / kv_heads;
      const int head = task % kv_heads;
      const float* cos = cos_.data() + row * dim / 2;
      const float* sin = sin_.data() + row * dim / 2;
      const auto turn = [&](float* x, const float* norm) {
        if (norm != nullptr) kernels_.rms_norm(x, norm, eps, heads.head_dim, x);
        kernels_.rotate(x, cos, sin, heads.head_dim, rope_interleaved_);
      };
      float* query = q + (Index{row} * heads.num_attention_heads + head * group) * dim;
      for (int g = 0; g < group; ++g) turn(query + g * dim, q_norm);
      const Index at = (Index{row} * kv_heads + head) * dim;
      turn(k + at, k_norm);

      const Index position = rows_.positions[row];
      store_kv(kv, kv.keys(layer, head), position / kLanes * dim * kLanes + position % kLanes,
               kLanes, k + at, heads.head_dim, kernels_.to_half);
      store_kv(kv, kv.values(layer, head), position * kv.padded_dim(), 1, v + at, heads.head_dim,
               kernels_.to_half);
    });
  }
}

void CpuBackend::attention(int layer, const HeadShape& heads, const float* q, float* out) {
  const int group = heads.num_attention_heads / heads.num_key_value_heads;
  const Index padded = static_cast<const CpuKv&>(*rows_.sequences[0].kv).padded_dim();
  const int rows_per_tile = std::max(1, kMaxQueries / group);

  // A tile: the queries of one key-value head in a few rows of a sequence. A task: a tile and a
  // split of its keys, with a partial result [queries][padded] outputs, maxima and sums.
  query_tiles_.clear();
  split_tiles_.clear();
  const Index queries = Index{rows_per_tile} * group;
  const Index split_floats = queries * (padded + 2);
  for (const SequenceRows& sequence : rows_.sequences) {
    for (int row = 0; row < sequence.n_rows; row += rows_per_tile) {
      const int first = sequence.first_row + row;
      const int n = std::min(rows_per_tile, sequence.n_rows - row);
      const int* ends = rows_.kv_end.data() + first;
      const int key_end = *std::max_element(ends, ends + n);
      for (int head = 0; head < heads.num_key_value_heads; ++head) {
        const int tile = static_cast<int>(query_tiles_.size());
        query_tiles_.push_back({static_cast<const CpuKv*>(sequence.kv), head, first, n, key_end,
                                static_cast<int>(split_tiles_.size())});
        split_tiles_.insert(split_tiles_.end(), static_cast<std::size_t>(n_splits(key_end)), tile);
        if (static_cast<Index>(split_tiles_.size()) * split_floats >= kPartialFloats) {
          attend(layer, heads, q, out, queries, padded);
        }
      }
    }
  }
  attend(layer, heads, q, out, queries, padded);
}

// Works the tiles gathered so far off.
void CpuBackend::attend(int layer, const HeadShape& heads, const float* q, float* out,
                        Index queries, Index padded) {
  const Index dim = heads.head_dim;
  const int group = heads.num_attention_heads / heads.num_key_value_heads;
  const Index split_floats = queries * (padded + 2);
  const auto needed = static_cast<std::size_t>(split_floats) * split_tiles_.size();
  if (partials_.size() < needed) partials_.resize(needed);

  pool_.run(static_cast<int>(split_tiles_.size()), [&](int split, int) {
    const QueryTile& tile = query_tiles_[split_tiles_[split]];
    AttentionTask t{};
    t.head_dim = heads.head_dim;
    t.padded_dim = static_cast<int>(padded);
    t.kv_dtype = tile.kv->dtype();
    t.keys = tile.kv->keys(layer, tile.kv_head);
    t.values = tile.kv->values(layer, tile.kv_head);
    t.key_begin = (split - tile.first_split) * kSplit;
    t.key_end = std::min(tile.key_end, t.key_begin + kSplit);
    t.scale = 1.0f / std::sqrt(static_cast<float>(heads.head_dim));
    float* partial = partials_.data() + split * split_floats;
    const int n_queries = tile.n_rows * group;
    for (int first = 0; first < n_queries; first += kMaxQueries) {  // more than one where group is
      t.n_queries = std::min(kMaxQueries, n_queries - first);
      for (int i = 0; i < t.n_queries; ++i) {
        const int row = tile.first_row + (first + i) / group;
        const int head = tile.kv_head * group + (first + i) % group;
        t.queries[i] = q + (Index{row} * heads.num_attention_heads + head) * dim;
        t.kv_end[i] = rows_.kv_end[row];
      }
      t.out = partial + first * padded;
      t.maxima = partial + queries * padded + first;
      t.sums = t.maxima + queries;
      kernels_.attention(t);
    }
  });

  // out = sum over splits of exp(max_s - max) out_s, divided by the same sum of the sums
  pool_.run(static_cast<int>(query_tiles_.size()), [&](int index, int) {
    const QueryTile& tile = query_tiles_[index];
    const int splits = n_splits(tile.key_end);
    const float* first = partials_.data() + tile.first_split * split_floats;
    for (int i = 0; i < tile.n_rows * group; ++i) {
      const Index max_at = queries * padded + i;
      const Index sum_at = max_at + queries;
      float top = kMinusInfinity;
      for (int s = 0; s < splits; ++s) top = std::max(top, first[s * split_floats + max_at]);
      const int row = tile.first_row + i / group;
      const int head = tile.kv_head * group + i % group;
      float* o = out + (Index{row} * heads.num_attention_heads + head) * dim;
      std::fill(o, o + dim, 0.0f);
      float sum = 0;
      for (int s = 0; s < splits; ++s) {
        const float* partial = first + s * split_floats;
        const float factor = std::exp(partial[max_at] - top);
        sum += factor * partial[sum_at];
        for (Index d = 0; d < dim; ++d) o[d] += factor * partial[i * padded + d];
      }
      for (Index d = 0; d < dim; ++d) o[d] /= sum;
    }
  });
  query_tiles_.clear();
  split_tiles_.clear();
}

}  // namespace sbd::cpu
