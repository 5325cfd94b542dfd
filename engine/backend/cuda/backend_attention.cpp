// CudaBackend: the cache and attention over it.
#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kv.h"

namespace sbd::cuda {

namespace {

constexpr std::size_t kPartialBytes = 128 << 20;  // of attention, at a time

// Splits of a launch: rounded up, so that a growing context meets few shapes and their graphs are
// found again. Blocks without keys end at once.
int rounded_splits(int n) {
  int unit = 1;
  while (n > 4 * unit) unit *= 2;
  return round_up(n, unit);
}

}  // namespace

DeviceMemory PagePool::take(std::size_t bytes) {
  const auto found = std::ranges::find(pages_, bytes, &DeviceMemory::size);
  if (found == pages_.end()) return DeviceMemory(bytes, "a sequence's KV cache");
  std::swap(*found, pages_.back());
  DeviceMemory page = std::move(pages_.back());
  pages_.pop_back();
  return page;
}

void PagePool::give(std::vector<DeviceMemory> pages) {
  std::ranges::move(pages, std::back_inserter(pages_));
}

bool PagePool::release() {
  const bool any = !pages_.empty();
  pages_.clear();
  return any;
}

CudaKv::CudaKv(CudaBackend& backend, int n_layers, const HeadShape& heads, int n_ctx, DType dtype)
    : backend_(backend),
      dtype_(dtype),
      n_ctx_(n_ctx),
      page_positions_(std::min(n_ctx, kPagePositions)),
      n_planes_(static_cast<std::size_t>(n_layers) * 2 *
                static_cast<std::size_t>(heads.num_key_value_heads)),
      padded_(stride(heads, dtype) != heads.head_dim) {
  page_bytes_ = bytes(n_layers, heads, n_ctx, dtype, 1);
  reserve(1);
}

void CudaKv::reserve(int n_positions) {
  const int n_pages = ceil_div(std::min(n_positions, n_ctx_), kPagePositions);
  while (static_cast<int>(pages_.size()) < n_pages) {
    pages_.push_back(backend_.take_page(page_bytes_, padded_));
  }
}

// Whole pages.
std::size_t CudaKv::bytes(int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
                          int n_positions) {
  const int n_planes = n_layers * 2 * heads.num_key_value_heads;
  const std::size_t page = static_cast<std::size_t>(n_planes) *
                           static_cast<std::size_t>(std::min(n_ctx, kPagePositions)) *
                           static_cast<std::size_t>(stride(heads, dtype)) * bytes_per_block(dtype);
  return static_cast<std::size_t>(ceil_div(n_positions, kPagePositions)) * page;
}

std::size_t CudaBackend::kv_bytes(int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
                                  int n_positions) const {
  return CudaKv::bytes(n_layers, heads, n_ctx, dtype, n_positions);
}

void CudaKv::copy(const KvStorage& from, int n_positions) {
  const auto& other = static_cast<const CudaKv&>(from);
  backend_.flush();  // what is on the tape may write to either
  reserve(n_positions);
  const std::size_t pitch = page_bytes_ / n_planes_;
  for (int first = 0; first < n_positions; first += kPagePositions) {
    const auto page = static_cast<std::size_t>(first / kPagePositions);
    const auto n = static_cast<std::size_t>(std::min(n_positions - first, page_positions_));
    check(cudaMemcpy2DAsync(pages_[page].data(), pitch, other.pages_[page].data(), pitch,
                            n * pitch / static_cast<std::size_t>(page_positions_), n_planes_,
                            cudaMemcpyDeviceToDevice, backend_.stream()),
          "copying a KV cache");
  }
}

void CudaKv::truncate(int n_positions) {
  const auto n = static_cast<std::size_t>(ceil_div(n_positions, kPagePositions));
  if (n >= pages_.size()) return;
  std::vector<DeviceMemory> rest(
      std::make_move_iterator(pages_.begin() + static_cast<std::ptrdiff_t>(n)),
      std::make_move_iterator(pages_.end()));
  pages_.resize(n);
  backend_.give_pages(std::move(rest));
}

CudaKv::~CudaKv() { backend_.give_pages(std::move(pages_)); }

DeviceMemory CudaBackend::take_page(std::size_t bytes, bool cleared) {
  DeviceMemory page = with_room([&] { return pool_.take(bytes); });
  if (cleared) {
    check(cudaMemsetAsync(page.data(), 0, page.size(), stream_), "clearing a KV cache");
  }
  return page;
}

// Who takes them next uses them behind what is on the stream by then.
void CudaBackend::give_pages(std::vector<DeviceMemory> pages) noexcept {
  try {
    flush();
  } catch (...) {  // recorded (runtime.h): the next operation is refused
  }
  pool_.give(std::move(pages));
}

void CudaBackend::rotate_and_cache(int layer, const HeadShape& heads, const float* q_norm,
                                   const float* k_norm, float eps, float* q, float* k,
                                   const float* v) {
  const DType dtype = static_cast<const CudaKv&>(*sequence_rows_[0].kv).dtype();
  CacheArgs args{};
  args.table = page_table_;
  args.sequences = sequences_;
  args.row_sequence = row_sequence_;
  args.places = places_;
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
  args.table = page_table_;
  args.sequences = sequences_;
  args.tiles = tiles_;
  args.row_sequence = row_sequence_;
  args.kv_end = row_kv_end_;
  args.unseen = unseen_;
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
  // Positions that the tiles [first, end) see.
  const auto positions_seen = [&](std::size_t first, std::size_t end) {
    std::vector<int> seen(sequence_rows_.size());
    for (std::size_t i = first; i < end; ++i) {
      int& most = seen[static_cast<std::size_t>(tile_infos_[i].sequence)];
      most = std::max(most, tile_infos_[i].key_end);
    }
    return std::accumulate(seen.begin(), seen.end(), 0.0);
  };
  const double position_bytes =
      2.0 * heads.num_key_value_heads * args.stride * static_cast<double>(bytes_per_block(dtype));
  int key_end = 0;
  for (const int end : kv_end_) key_end = std::max(key_end, end);
  args.n_splits = rounded_splits(splits_of(key_end));
  const std::size_t row_floats = static_cast<std::size_t>(args.n_splits) *
                                 static_cast<std::size_t>(args.heads) *
                                 static_cast<std::size_t>(partial_floats(kMaxHeadDim));
  const std::size_t max_rows =
      std::max(kPartialBytes / (row_floats * 4), static_cast<std::size_t>(tile_rows));
  // As many tiles at a time as their partial results have room.
  for (std::size_t tile = 0; tile < tile_infos_.size();) {
    const int first_row = first_row_of(tile);
    std::size_t end = tile;
    int end_row = first_row;
    while (end < tile_infos_.size()) {
      const int next = first_row_of(end) + tile_infos_[end].n_queries / group;
      if (end > tile && static_cast<std::size_t>(next - first_row) > max_rows) break;
      end_row = next;
      ++end;
    }
    args.first_tile = static_cast<int>(tile);
    args.n_tiles = static_cast<int>(end - tile);
    args.first_row = first_row;
    args.n_rows = end_row - first_row;
    args.partials =
        grown<float>(attention_partials_, row_floats * static_cast<std::size_t>(args.n_rows));
    cuda::attention(tape_, args, positions_seen(tile, end) * position_bytes);
    tile = end;
  }
}

}  // namespace sbd::cuda
