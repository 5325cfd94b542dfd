// CudaBackend: the cache and attention over it.
#include <algorithm>
#include <utility>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kv.h"

namespace sbd::cuda {

namespace {

constexpr std::size_t kPartialBytes = 128 << 20;  // of attention, at a time
constexpr int kFirstPositions = 2048;             // that a cache has room for before it grows

// Splits of a launch: rounded up, so that a growing context meets few shapes and their graphs are
// found again. Blocks without keys end at once.
int rounded_splits(int n) {
  int unit = 1;
  while (n > 4 * unit) unit *= 2;
  return round_up(n, unit);
}

}  // namespace

CudaKv::CudaKv(CudaBackend& backend, int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
               cudaStream_t stream)
    : backend_(backend),
      dtype_(dtype),
      n_ctx_(n_ctx),
      n_runs_(static_cast<std::size_t>(n_layers) * 2 *
              static_cast<std::size_t>(heads.num_key_value_heads)),
      row_bytes_(static_cast<std::size_t>(stride(heads, dtype)) * bytes_per_block(dtype)),
      padded_(stride(heads, dtype) != heads.head_dim) {
  reserve(std::min(n_ctx, kFirstPositions), stream);
}

void CudaKv::reserve(int n_positions, cudaStream_t stream) {
  if (std::min(n_positions, n_ctx_) <= capacity_) return;
  const int capacity = std::min(n_ctx_, std::max(n_positions, 2 * capacity_));
  const std::size_t pitch = static_cast<std::size_t>(capacity) * row_bytes_;
  const std::size_t old_pitch = static_cast<std::size_t>(capacity_) * row_bytes_;
  DeviceMemory memory(n_runs_ * pitch, "a sequence's KV cache");
  if (padded_) {
    check(cudaMemsetAsync(memory.data(), 0, memory.size(), stream), "clearing a KV cache");
  }
  if (capacity_ > 0) {
    check(cudaMemcpy2DAsync(memory.data(), pitch, memory_.data(), old_pitch, old_pitch, n_runs_,
                            cudaMemcpyDeviceToDevice, stream),
          "growing a KV cache");
    check(cudaStreamSynchronize(stream), "growing a KV cache");
  }
  memory_ = std::move(memory);
  capacity_ = capacity;
}

std::size_t CudaKv::bytes(int n_positions) const {
  return n_runs_ * row_bytes_ * static_cast<std::size_t>(n_positions);
}

void CudaKv::copy(const KvStorage& from, int n_positions) {
  const auto& other = static_cast<const CudaKv&>(from);
  reserve(n_positions, backend_.stream());
  check(cudaMemcpy2DAsync(memory_.data(), static_cast<std::size_t>(capacity_) * row_bytes_,
                          other.memory_.data(),
                          static_cast<std::size_t>(other.capacity_) * row_bytes_,
                          static_cast<std::size_t>(n_positions) * row_bytes_, n_runs_,
                          cudaMemcpyDeviceToDevice, backend_.stream()),
        "copying a KV cache");
}

CudaKv::~CudaKv() { backend_.settle(); }

void CudaBackend::rotate_and_cache(int layer, const HeadShape& heads, const float* q_norm,
                                   const float* k_norm, float eps, float* q, float* k,
                                   const float* v) {
  const DType dtype = static_cast<const CudaKv&>(*sequence_rows_[0].kv).dtype();
  CacheArgs args{};
  args.sequences = sequences_;
  args.row_sequence = row_sequence_;
  args.positions = positions_;
  args.query_scale = query_scale_;
  args.angles = angle_table_;
  args.q_norm = q_norm;
  args.k_norm = k_norm;
  args.q = q;
  args.k = k;
  args.v = v;
  args.eps = eps;
  args.layer = layer;
  args.n_rows = n_rows();
  args.heads = heads.num_attention_heads;
  args.kv_heads = heads.num_key_value_heads;
  args.head_dim = heads.head_dim;
  args.stride = CudaKv::stride(heads, dtype);
  args.kv_dtype = dtype;
  args.interleaved = rope_interleaved_;
  cuda::rotate_and_cache(tape_, args);
}

void CudaBackend::attention(int layer, const HeadShape& heads, const float* q, float* out) {
  const int group = heads.num_attention_heads / heads.num_key_value_heads;
  const int tile_rows = kTileQueries / group;
  if (tiles_ == nullptr) {
    for (std::size_t i = 0; i < sequence_rows_.size(); ++i) {
      const SequenceRows& sequence = sequence_rows_[i];
      for (int row = 0; row < sequence.n_rows; row += tile_rows) {
        const int n = std::min(tile_rows, sequence.n_rows - row);
        const int* ends = kv_end_.data() + sequence.first_row + row;
        tile_infos_.push_back(
            {static_cast<int>(i), row * group, n * group, *std::max_element(ends, ends + n)});
      }
    }
    tiles_ = metadata_.add(std::span<const QueryTileInfo>(tile_infos_));
  }

  const DType dtype = static_cast<const CudaKv&>(*sequence_rows_[0].kv).dtype();
  AttentionArgs args{};
  args.sequences = sequences_;
  args.tiles = tiles_;
  args.row_sequence = row_sequence_;
  args.kv_end = row_kv_end_;
  args.q = q;
  args.out = out;
  args.layer = layer;
  args.heads = heads.num_attention_heads;
  args.kv_heads = heads.num_key_value_heads;
  args.head_dim = heads.head_dim;
  args.stride = CudaKv::stride(heads, dtype);
  args.kv_dtype = dtype;

  const auto first_row_of = [&](std::size_t tile) {
    const QueryTileInfo& info = tile_infos_[tile];
    return sequence_rows_[static_cast<std::size_t>(info.sequence)].first_row +
           info.first_query / group;
  };
  int key_end = 0;
  for (const int end : kv_end_) key_end = std::max(key_end, end);
  args.n_splits = rounded_splits(splits_of(key_end));
  const std::size_t row_floats = static_cast<std::size_t>(args.n_splits) *
                                 static_cast<std::size_t>(args.heads) * (kMostHeadDim + 2);
  const std::size_t most_rows =
      std::max(kPartialBytes / (row_floats * 4), static_cast<std::size_t>(tile_rows));
  // As many tiles at a time as their partial results have room.
  for (std::size_t tile = 0; tile < tile_infos_.size();) {
    const int first_row = first_row_of(tile);
    std::size_t end = tile;
    int end_row = first_row;
    while (end < tile_infos_.size()) {
      const int next = first_row_of(end) + tile_infos_[end].n_queries / group;
      if (end > tile && static_cast<std::size_t>(next - first_row) > most_rows) break;
      end_row = next;
      ++end;
    }
    args.first_tile = static_cast<int>(tile);
    args.n_tiles = static_cast<int>(end - tile);
    args.first_row = first_row;
    args.n_rows = end_row - first_row;
    args.partials =
        grown<float>(attention_partials_, row_floats * static_cast<std::size_t>(args.n_rows));
    cuda::attention(tape_, args);
    tile = end;
  }
}

}  // namespace sbd::cuda
