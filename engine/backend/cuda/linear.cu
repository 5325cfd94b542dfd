// The floor of a forward of few rows is the time to read the weights once. So weights are streamed
// through shared memory in stages of some 16 KB, several under way per block and two blocks or more
// on a multiprocessor: 64 KB and more in flight on each, where an H100 needs about 20 (3.4 TB/s
// times 0.7 us, over 132). What the stages feed must not become the limit: per 32 features and 32
// inputs a warp reads its weights once and each group of eight rows once from shared memory, which
// at 64 rows is 6 KB (48 cycles) where the weights of 1024 bf16 need 130 cycles to arrive, and
// those of q8_0 70.
//
// Weights are the product's first operand (16 features), rows its second (8 rows), so that one row
// costs no more than eight.
#include "backend/cuda/linear.h"

#include <algorithm>
#include <type_traits>

#include "backend/cuda/formats.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarpTiles = kBlockTiles / (kThreads / kWarp);
constexpr int kRowGroup = 8;
constexpr int kPieces = 2 * kChunk / 16;  // of a row's chunk of activations
// Rows of a chunk of activations in shared memory: 64 bytes modulo 128 apart, so that the two rows
// that eight lanes read at a time lie in different banks.
constexpr int kRowPitch = 2 * kChunk + 64;

template <typename Format, int kGroups>
constexpr int stage_bytes() {
  return Format::kStageBytes + kGroups * kRowGroup * kRowPitch;
}

// At most 88 KB, which every device from sm_80 on has.
template <typename Format, int kGroups>
constexpr int n_stages() {
  constexpr int kFit = 88 * 1024 / stage_bytes<Format, kGroups>();
  return kFit < 6 ? kFit : 6;
}

struct Block {  // what a thread block computes
  const LinearPart* part;
  int block;  // of the part
  int first_chunk, end_chunk;
  int first_row, n_rows;
};

__device__ Block block_at(const LinearArgs& a, int rows_per_tile) {
  int i = 0;
  while (i + 1 < a.n_parts && static_cast<int>(blockIdx.x) >= a.parts[i + 1].first_block) ++i;
  const int split = static_cast<int>(blockIdx.y);
  const int first_row = static_cast<int>(blockIdx.z) * rows_per_tile;
  const int left = a.n_rows - first_row;
  return {&a.parts[i],
          static_cast<int>(blockIdx.x) - a.parts[i].first_block,
          a.n_chunks * split / a.n_splits,
          a.n_chunks * (split + 1) / a.n_splits,
          first_row,
          left < rows_per_tile ? left : rows_per_tile};
}

template <int kGroups>
using Sums = float[kWarpTiles][kGroups][4];

// Calls f(feature of the part, row of the tile, sum) for each of the thread's sums.
template <int kGroups, typename F>
__device__ void for_each_sum(const Block& b, Sums<kGroups>& sums, F f) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int tile = 0; tile < kWarpTiles; ++tile) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int feature = b.block * kBlockFeatures + (warp * kWarpTiles + tile) * kTileFeatures +
                            i / 2 * 8 + lane / 4;
        const int row = group * kRowGroup + lane % 4 * 2 + i % 2;
        if (feature < b.part->features && row < b.n_rows) f(feature, row, sums[tile][group][i]);
      }
    }
  }
}

template <typename Format, int kGroups>
__device__ void start_stage(const LinearArgs& a, const Block& b, int chunk, std::uint8_t* stage,
                            bool weights, bool rows) {
  if (weights) {
    const std::uint8_t* from =
        b.part->weight + (Index{b.block} * a.n_chunks + chunk) * Format::kStageBytes;
    for (int i = threadIdx.x; i < Format::kStageBytes / 16; i += kThreads) {
      copy_async(stage + i * 16, from + i * 16, true);
    }
  }
  if (rows) {
    std::uint8_t* to = stage + Format::kStageBytes;
    const auto* x = static_cast<const std::uint8_t*>(a.x);
    for (int i = threadIdx.x; i < kGroups * kRowGroup * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool real = row < b.n_rows;
      const Index source = b.first_row + (real ? row : 0);
      copy_async(to + row * kRowPitch + piece * 16,
                 x + (source * a.n_chunks + chunk) * (2 * kChunk) + piece * 16, real);
    }
  }
}

template <typename Format, int kGroups>
__device__ void multiply_stage(const std::uint8_t* stage, Sums<kGroups>& sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::uint8_t* x = stage + Format::kStageBytes + lane / 4 * kRowPitch + lane % 4 * 16;
#pragma unroll
  for (int step = 0; step < kChunkSteps; ++step) {
    uint4 rows[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      rows[group] = *reinterpret_cast<const uint4*>(x + group * kRowGroup * kRowPitch +
                                                    step * kStepInputs * 2);
    }
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      const int tile = warp * kWarpTiles + t;
      TileOperand weights;
      Format::load(stage, tile, step, lane, weights);
      float low = 1, high = 1;
      if constexpr (Format::kScaled) {
        const std::uint32_t scales = Format::scales(stage, tile, step, lane);
        low = low_half(scales);
        high = high_half(scales);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float (&sum)[4] = sums[t][group];
        if constexpr (Format::kScaled) {
          float products[4] = {};
          Format::multiply(products, weights[0], rows[group].x, rows[group].y);
          Format::multiply(products, weights[1], rows[group].z, rows[group].w);
          sum[0] = fmaf(products[0], low, sum[0]);
          sum[1] = fmaf(products[1], low, sum[1]);
          sum[2] = fmaf(products[2], high, sum[2]);
          sum[3] = fmaf(products[3], high, sum[3]);
        } else {
          Format::multiply(sum, weights[0], rows[group].x, rows[group].y);
          Format::multiply(sum, weights[1], rows[group].z, rows[group].w);
        }
      }
    }
  }
}

__device__ void write_output(const LinearArgs& a, const Block& b, int feature, int row, float sum) {
  const Index at = Index{b.first_row + row} * b.part->features + feature;
  if (a.row_scale != nullptr) sum *= a.row_scale[b.first_row + row];
  if (b.part->bias != nullptr) sum += b.part->bias[feature];
  if (a.accumulate != 0) sum += b.part->out[at];
  b.part->out[at] = sum;
}

// Blocks that share outputs leave their sums in memory; the last one of them adds all, in order.
template <int kGroups>
__device__ bool add_splits(const LinearArgs& a, Sums<kGroups>& sums) {
  constexpr int kSums = kWarpTiles * kGroups * 4;
  const Index place = Index{blockIdx.z} * a.n_blocks + blockIdx.x;
  float* partials = a.partials + place * a.n_splits * kSums * kThreads + threadIdx.x;
  float* mine = partials + Index{blockIdx.y} * kSums * kThreads;
  float (&flat)[kSums] = reinterpret_cast<float (&)[kSums]>(sums);
#pragma unroll
  for (int i = 0; i < kSums; ++i) __stcg(mine + i * kThreads, flat[i]);
  __threadfence();
  __syncthreads();
  auto* is_last = reinterpret_cast<int*>(shared_memory());  // the stages are used up
  if (threadIdx.x == 0) {
    const unsigned before = atomicAdd(a.counters + place, 1u);
    *is_last = before + 1 == static_cast<unsigned>(a.n_splits);
    if (*is_last) a.counters[place] = 0;
  }
  __syncthreads();
  if (!*is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kSums; ++i) flat[i] = 0;
  for (int split = 0; split < a.n_splits; ++split) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      flat[i] += __ldcg(partials + (Index{split} * kSums + i) * kThreads);
    }
  }
  return true;
}

template <typename Format, int kGroups>
__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ LinearArgs a) {
  constexpr int kStages = n_stages<Format, kGroups>();
  constexpr int kStageBytes = stage_bytes<Format, kGroups>();
  std::uint8_t* stages = shared_memory();
  const Block b = block_at(a, kGroups * kRowGroup);
  const auto start = [&](int chunk, bool weights, bool rows) {
    const int slot = (chunk - b.first_chunk) % kStages;
    if (chunk < b.end_chunk) {
      start_stage<Format, kGroups>(a, b, chunk, stages + slot * kStageBytes, weights, rows);
    }
  };

  // Weights change in no kernel: the first stages are on their way before the activations exist.
  let_next_kernel_start();
  for (int i = 0; i < kStages - 1; ++i) start(b.first_chunk + i, true, false);
  wait_for_previous_kernel();
  for (int i = 0; i < kStages - 1; ++i) {
    start(b.first_chunk + i, false, true);
    commit_copies();  // the first group holds the weights of all stages so far
  }

  Sums<kGroups> sums = {};
  for (int chunk = b.first_chunk; chunk < b.end_chunk; ++chunk) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage is there for all, and none still reads the one before
    start(chunk + kStages - 1, true, true);
    commit_copies();
    const int slot = (chunk - b.first_chunk) % kStages;
    multiply_stage<Format, kGroups>(stages + slot * kStageBytes, sums);
  }
  wait_copies<0>();
  __syncthreads();
  if (a.n_splits > 1 && !add_splits<kGroups>(a, sums)) return;
  for_each_sum<kGroups>(
      b, sums, [&](int feature, int row, float sum) { write_output(a, b, feature, row, sum); });
}

// float32 throughout, to check the other types against: a warp computes a feature for eight rows.
__global__ void __launch_bounds__(kThreads)
    linear_f32_kernel(const __grid_constant__ LinearArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Block b = block_at(a, kRowGroup);
  const int lane = threadIdx.x % kWarp;
  const auto* x = static_cast<const float*>(a.x) + Index{b.first_row} * a.cols;
  for (int i = threadIdx.x / kWarp; i < kBlockFeatures; i += kThreads / kWarp) {
    const int feature = b.block * kBlockFeatures + i;
    if (feature >= b.part->features) return;
    const float* w = reinterpret_cast<const float*>(b.part->weight) + Index{feature} * a.cols;
    float sums[kRowGroup] = {};
    for (int k = lane; k < a.cols; k += kWarp) {
      const float weight = w[k];
#pragma unroll
      for (int row = 0; row < kRowGroup; ++row) {
        if (row < b.n_rows) sums[row] = fmaf(weight, x[Index{row} * a.cols + k], sums[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRowGroup; ++row) {
      const float sum = warp_sum(sums[row]);
      if (lane == 0 && row < b.n_rows) write_output(a, b, feature, row, sum);
    }
  }
}

template <typename Format, int kGroups>
void add_launch(Tape& tape, const LinearArgs& args) {
  const Grid grid{.x = args.n_blocks,
                  .y = args.n_splits,
                  .z = ceil_div(args.n_rows, kGroups * kRowGroup),
                  .threads = kThreads,
                  .shared_bytes = n_stages<Format, kGroups>() * stage_bytes<Format, kGroups>()};
  tape.add(linear_kernel<Format, kGroups>, grid, args);
}

// The fewest groups of eight rows that hold all; beyond 64 rows, tiles of 64.
int row_groups(int n_rows) { return n_rows <= 8 ? 1 : n_rows <= 16 ? 2 : n_rows <= 32 ? 4 : 8; }

template <typename Format>
void add_launch(Tape& tape, const LinearArgs& args) {
  switch (row_groups(args.n_rows)) {
    case 1: return add_launch<Format, 1>(tape, args);
    case 2: return add_launch<Format, 2>(tape, args);
    case 4: return add_launch<Format, 4>(tape, args);
    default: return add_launch<Format, 8>(tape, args);
  }
}

}  // namespace

int choose_splits(int n_blocks, int n_chunks, int n_multiprocessors) {
  return std::clamp(2 * n_multiprocessors / n_blocks, 1, std::max(1, n_chunks / 4));
}

LinearScratch linear_scratch(const LinearArgs& args) {
  const int groups = row_groups(args.n_rows);
  const auto tiles = static_cast<std::size_t>(ceil_div(args.n_rows, groups * kRowGroup));
  const std::size_t places = tiles * static_cast<std::size_t>(args.n_blocks);
  const auto block_sums = static_cast<std::size_t>(kBlockFeatures * groups * kRowGroup);
  return {places * static_cast<std::size_t>(args.n_splits) * block_sums, places};
}

void linear(Tape& tape, DType dtype, const LinearArgs& args) {
  switch (dtype) {
    case DType::f16: return add_launch<F16Format>(tape, args);
    case DType::bf16: return add_launch<BF16Format>(tape, args);
    case DType::q8_0: return add_launch<Q8Format>(tape, args);
    case DType::q4_0: return add_launch<Q4Format>(tape, args);
    default: break;
  }
  tape.add(linear_f32_kernel,
           {.x = args.n_blocks, .z = ceil_div(args.n_rows, kRowGroup), .threads = kThreads}, args);
}

}  // namespace sbd::cuda
