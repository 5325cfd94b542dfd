// CpuBackend: keys and values into the cache, and attention over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/cpu_backend.h"

namespace sbd::cpu {

namespace {

// Queries that share a task, and with it the conversion of its keys and values, which costs about
// as much as five of them. Results do not depend on it: where it would leave threads without a
// task it is halved, down to the lower one.
constexpr int kMaxQueries = 128;
constexpr int kMinQueries = 16;
constexpr Index kTileFloats = 1 << 17;  // of the queries: wide heads have fewer

// Rows of a head that one task writes to the cache: as many positions share a line of its keys.
constexpr int kCacheRows = kLanes;

// Partial results that are kept at a time: 32 MiB, or one tile's where that is more.
constexpr Index kPartialFloats = 8 << 20;

int n_splits(int key_end) { return (key_end + kKeysPerSplit - 1) / kKeysPerSplit; }

// Groups of Width neighbours, `stride` apart in `out`
template <int Width, typename T>
void scatter(const T* x, int n, T* out, int stride) {
  for (int i = 0; i < n; i += Width, out += stride) std::memcpy(out, x + i, Width * sizeof(T));
}

// The same, in the cache's type.
void store_kv(DType dtype, std::uint8_t* base, Index at, int width, int stride, const float* x,
              int n, const Kernels& kernels) {
  if (dtype == DType::f32) {
    scatter<1>(x, n, reinterpret_cast<float*>(base) + at, stride);
    return;
  }
  constexpr int kChunk = 128;
  const auto to_short = dtype == DType::f16 ? kernels.to_half : kernels.to_bf16;
  std::uint16_t shorts[kChunk];
  auto* out = reinterpret_cast<std::uint16_t*>(base) + at;
  for (int i = 0; i < n; i += kChunk, out += kChunk / width * stride) {
    const int count = std::min(kChunk, n - i);
    to_short(x + i, count, shorts);
    if (width == 2) {
      scatter<2>(shorts, count, out, stride);
    } else {
      scatter<1>(shorts, count, out, stride);
    }
  }
}

// A head's keys or values at one position of a Q8_0 cache
void store_quantized(CachedGroup* groups, int position, bool is_key, const float* x, int n,
                     const Kernels& kernels) {
  const int lane = position % kLanes;
  for (int i = 0; i < n; i += kGroupSize, ++groups) {
    QuantizedGroup group;
    kernels.quantize(x + i, kGroupSize, &group);
    kernels.to_half(&group.scale, 1, groups->scales + lane);
    if (is_key) {
      scatter<1>(group.quants, kGroupSize, groups->quants + lane, kLanes);
    } else {
      std::memcpy(groups->quants + lane * kGroupSize, group.quants, kGroupSize);
    }
  }
}

}  // namespace

void CpuBackend::rotate_and_cache(int layer, const HeadShape& heads, const float* q_norm,
                                  const float* k_norm, float eps, float* q, float* k,
                                  const float* v) {
  const Index dim = heads.head_dim;
  const int kv_heads = heads.num_key_value_heads;
  const int group = heads.num_attention_heads / kv_heads;
  const std::span<const int> places = rows_.places.empty() ? rows_.positions : rows_.places;
  for (const SequenceRows& sequence : rows_.sequences) {
    const auto& kv = static_cast<const CpuKv&>(*sequence.kv);
    const int u = kv.interleave();
    const int blocks = (sequence.n_rows + kCacheRows - 1) / kCacheRows;
    pool_.run(blocks * kv_heads, [&](int task, int) {
      const int head = task / blocks;
      const int begin = task % blocks * kCacheRows;
      const int end = std::min(begin + kCacheRows, sequence.n_rows);
      for (Index row = sequence.first_row + begin; row < sequence.first_row + end; ++row) {
        const float* cos = cos_.data() + row * dim / 2;
        const float* sin = sin_.data() + row * dim / 2;
        const auto turn = [&](float* x, const float* norm) {
          if (norm != nullptr) kernels_.rms_norm(x, norm, eps, heads.head_dim, x);
          kernels_.rotate(x, cos, sin, heads.head_dim, rope_interleaved_);
        };
        float* query = q + (row * heads.num_attention_heads + head * group) * dim;
        for (int g = 0; g < group; ++g) turn(query + g * dim, q_norm);
        if (!rows_.query_scale.empty()) {
          const float scale = rows_.query_scale[static_cast<std::size_t>(row)];
          for (Index i = 0; i < group * dim; ++i) query[i] *= scale;
        }
        const Index at = (row * kv_heads + head) * dim;
        turn(k + at, k_norm);

        const Index place = places[static_cast<std::size_t>(row)];
        if (kv.dtype() == DType::q8_0) {
          const Index at_group = place / kLanes * (dim / kGroupSize);
          const auto store = [&](std::uint8_t* base, bool is_key, const float* x) {
            store_quantized(reinterpret_cast<CachedGroup*>(base) + at_group,
                            static_cast<int>(place), is_key, x, heads.head_dim, kernels_);
          };
          store(kv.keys(layer, head), true, k + at);
          store(kv.values(layer, head), false, v + at);
          continue;
        }
        const Index key_at = place / kLanes * dim * kLanes + place % kLanes * u;
        const Index value_at = place / u * kv.padded_dim() * u + place % u;
        store_kv(kv.dtype(), kv.keys(layer, head), key_at, u, kLanes * u, k + at, heads.head_dim,
                 kernels_);
        store_kv(kv.dtype(), kv.values(layer, head), value_at, 1, u, v + at, heads.head_dim,
                 kernels_);
      }
    });
  }
}

// A tile: the queries of one key-value head in a few rows of a sequence. A task: a tile and a split
// of its keys.
void CpuBackend::attention(int layer, const HeadShape& heads, const float* q, float* out) {
  const int kv_heads = heads.num_key_value_heads;
  const int group = heads.num_attention_heads / kv_heads;
  const int padded = static_cast<const CpuKv&>(*rows_.sequences[0].kv).padded_dim();

  const Index queries = std::min<Index>(kMaxQueries, kTileFloats / padded);
  int rows_per_tile = std::max(1, static_cast<int>(queries / group));
  const auto n_tasks = [&] {
    Index n = 0;
    for (const SequenceRows& sequence : rows_.sequences) {
      const int tiles = (sequence.n_rows + rows_per_tile - 1) / rows_per_tile;
      n += Index{tiles} * kv_heads * n_splits(rows_.kv_end[sequence.first_row]);
    }
    return n;
  };
  while (n_tasks() < 2 * pool_.size() && rows_per_tile * group >= 2 * kMinQueries &&
         rows_per_tile > 1) {
    rows_per_tile /= 2;
  }

  const AttentionLayout layout =
      attention_layout(Index{rows_per_tile} * group, heads.head_dim, padded);
  const Index partial_floats = layout.partial_floats;
  const Index scratch_floats = partial_floats + layout.scratch_floats;
  if (attention_scratch_floats_ < scratch_floats) {
    attention_scratch_ = allocate(static_cast<std::size_t>(scratch_floats * pool_.size()));
    attention_scratch_floats_ = scratch_floats;
  }
  query_tiles_.clear();  // a forward that failed may have left some
  split_tiles_.clear();
  for (const SequenceRows& sequence : rows_.sequences) {
    for (int row = 0; row < sequence.n_rows; row += rows_per_tile) {
      const int first = sequence.first_row + row;
      const int n = std::min(rows_per_tile, sequence.n_rows - row);
      const int* ends = rows_.kv_end.data() + first;
      const int key_end = *std::max_element(ends, ends + n);
      for (int head = 0; head < kv_heads; ++head) {
        const int tile = static_cast<int>(query_tiles_.size());
        query_tiles_.push_back({static_cast<const CpuKv*>(sequence.kv), head, first, n, key_end,
                                static_cast<int>(split_tiles_.size())});
        split_tiles_.insert(split_tiles_.end(), static_cast<std::size_t>(n_splits(key_end)), tile);
        if (static_cast<Index>(split_tiles_.size()) * partial_floats >= kPartialFloats) {
          attend(layer, heads, q, out, partial_floats);
        }
      }
    }
  }
  attend(layer, heads, q, out, partial_floats);
}

// Works the tiles gathered so far off.
void CpuBackend::attend(int layer, const HeadShape& heads, const float* q, float* out,
                        Index partial_floats) {
  const Index dim = heads.head_dim;
  const int group = heads.num_attention_heads / heads.num_key_value_heads;
  const Index row_stride = heads.num_attention_heads * dim;
  const auto needed = static_cast<std::size_t>(partial_floats) * split_tiles_.size();
  if (partials_.size() < needed) partials_.resize(needed);

  const auto merge = [&](const QueryTile& tile, float* partials) {
    const Index at = tile.first_row * row_stride + tile.kv_head * group * dim;
    kernels_.merge_attention({partials, partial_floats, rows_.kv_end.data() + tile.first_row,
                              tile.n_rows, group, heads.head_dim, tile.kv->padded_dim(), out + at,
                              row_stride});
  };
  const auto prefetch_behind = [&](int split, AttentionTask& t) {
    split = std::min(split + 1, static_cast<int>(split_tiles_.size()) - 1);
    const QueryTile& next = query_tiles_[split_tiles_[split]];
    const Index first = Index{split - next.first_split} * kKeysPerSplit;
    const DType dtype = next.kv->dtype();
    t.next_keys = next.kv->keys(layer, next.kv_head) + bytes_of_values(dtype, first * dim);
    t.next_values = next.kv->values(layer, next.kv_head) +
                    bytes_of_values(dtype, first * next.kv->padded_dim());
  };
  bool any_split = false;
  for (const QueryTile& tile : query_tiles_) any_split |= tile.key_end > kKeysPerSplit;

  pool_.run(static_cast<int>(split_tiles_.size()), [&](int split, int thread) {
    const QueryTile& tile = query_tiles_[split_tiles_[split]];
    float* scratch = attention_scratch_.get() + thread * attention_scratch_floats_;
    const bool whole = tile.key_end <= kKeysPerSplit;
    AttentionTask t{};
    t.queries = q + tile.first_row * row_stride + tile.kv_head * group * dim;
    t.kv_end = rows_.kv_end.data() + tile.first_row;
    if (!rows_.unseen.empty()) t.unseen = rows_.unseen.data() + tile.first_row;
    t.row_stride = row_stride;
    t.n_rows = tile.n_rows;
    t.group = group;
    t.head_dim = heads.head_dim;
    t.padded_dim = tile.kv->padded_dim();
    t.kv_dtype = tile.kv->dtype();
    t.keys = tile.kv->keys(layer, tile.kv_head);
    t.values = tile.kv->values(layer, tile.kv_head);
    t.key_begin = (split - tile.first_split) * kKeysPerSplit;
    t.key_end = std::min(tile.key_end, t.key_begin + kKeysPerSplit);
    t.scale = 1.0f / std::sqrt(static_cast<float>(heads.head_dim));
    prefetch_behind(split, t);
    t.partial = whole ? scratch : partials_.data() + split * partial_floats;
    t.scratch = scratch + partial_floats;
    kernels_.attention(t);
    if (whole) merge(tile, t.partial);
  });
  if (any_split) {
    pool_.run(static_cast<int>(query_tiles_.size()), [&](int index, int) {
      const QueryTile& tile = query_tiles_[index];
      if (tile.key_end > kKeysPerSplit) {
        merge(tile, partials_.data() + tile.first_split * partial_floats);
      }
    });
  }
  query_tiles_.clear();
  split_tiles_.clear();
}

}  // namespace sbd::cpu
