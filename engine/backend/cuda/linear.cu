// Few rows. The floor of a forward is the time to read the weights once. So weights are streamed
// through shared memory in stages of some 16 KB, several under way per block and two blocks or more
// on a multiprocessor: 64 KB and more in flight on each, where an H100 needs about 20 (3.4 TB/s
// times 0.7 us, over 132).
//
// What the stages feed must not become the limit. A stage's weights take so many cycles to arrive
// at one multiprocessor of an H100 (14.5 bytes each), in which each of its four schedulers has to
// issue one warp's instructions (of the code for sm_90):
//            arrives in   8 rows   16    32    64
//   bf16        1130          78   86   104   145
//   q8_0         600         193  220   298   385
//   q6_k         463         331  371   481   629
//   q5_k         397         343  370   449   634
//   q4_k         327         275  304   399   568
//   q4_0         320         170  193   280   357
// At 64 rows, the tensor cores take 6.5 cycles for each of a warp's 64 products, 416; and shared
// memory, at 128 bytes a cycle, 380, 320 and 290 for the weights once and the rows once for each
// warp of bf16, q8_0 and q4_0. So q4_0 at 64 rows is limited by something else than memory, and
// K-quants from 32 rows on are by instructions: eight scale the sums of two products, four of other
// quants. As f16 they would take 1130.
#include "backend/cuda/linear.h"

#include <algorithm>

#include "backend/cuda/linear_tile.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 128;

template <int kGroups>
using FewRows = TileShape<kThreads / kWarp, 1, kGroups>;

// At most 88 KB, which every device from sm_80 on has.
template <typename Format, int kGroups>
constexpr int n_stages() {
  constexpr int kFit = 88 * 1024 / kTileStageBytes<Format, FewRows<kGroups>>;
  return kFit < 6 ? kFit : 6;
}

// Blocks that share outputs leave their sums in memory; the last one of them adds all, in order.
template <int kGroups>
__device__ bool add_splits(const LinearArgs& a, typename FewRows<kGroups>::Sums& sums) {
  constexpr int kSums = sizeof(sums) / sizeof(float);
  const Index place = Index{blockIdx.z} * a.n_blocks + blockIdx.x;
  float* partials = a.partials + place * a.n_splits * kSums * kThreads + threadIdx.x;
  float* mine = partials + Index{blockIdx.y} * kSums * kThreads;
  float (&flat)[kSums] = reinterpret_cast<float (&)[kSums]>(sums);
#pragma unroll
  for (int i = 0; i < kSums; ++i) __stcg(mine + i * kThreads, flat[i]);
  __syncthreads();
  auto* is_last = reinterpret_cast<int*>(shared_memory());  // the stages are used up
  if (threadIdx.x == 0) {
    // One thread's fences are the block's, as barriers order the others before and behind it: the
    // first between what all have written and the count, the second between the count and what all
    // read.
    __threadfence();
    const unsigned before = atomicAdd(a.counters + place, 1u);
    __threadfence();
    *is_last = before + 1 == static_cast<unsigned>(a.n_splits);
    if (*is_last) a.counters[place] = 0;
  }
  __syncthreads();
  if (!*is_last) return false;
  // Some 32 reads under way at a time: a round trip to L2 is as long as a tenth of a short kernel.
  constexpr int kAtOnce = kSums < 32 ? 32 / kSums : 1;
#pragma unroll
  for (int i = 0; i < kSums; ++i) flat[i] = 0;
  for (int first = 0; first < a.n_splits; first += kAtOnce) {
    float parts[kAtOnce][kSums] = {};
#pragma unroll
    for (int split = 0; split < kAtOnce; ++split) {
      if (first + split >= a.n_splits) continue;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        parts[split][i] = __ldcg(partials + (Index{first + split} * kSums + i) * kThreads);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce * kSums; ++i) flat[i % kSums] += parts[i / kSums][i % kSums];
  }
  return true;
}

template <typename Format, int kGroups>
__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ LinearArgs a) {
  using Shape = FewRows<kGroups>;
  constexpr int kStages = n_stages<Format, kGroups>();
  constexpr int kStageBytes = kTileStageBytes<Format, Shape>;
  const Tile tile = tile_at(a, static_cast<int>(blockIdx.x),
                            static_cast<int>(blockIdx.z) * Shape::kRows, Shape::kRows);
  const int split = static_cast<int>(blockIdx.y);
  const int first_chunk = a.n_chunks * split / a.n_splits;
  const int end_chunk = a.n_chunks * (split + 1) / a.n_splits;
  const auto stage = [&](int chunk) {
    return shared_memory() + (chunk - first_chunk) % kStages * kStageBytes;
  };
  Copies<Format, Shape> copies(a, tile, first_chunk);

  // Weights change in no kernel: the first stages are on their way before the activations exist,
  // and some behind them as far as L2.
  let_next_kernel_start();
  const CachePolicy policy = cache_policy(a.evict_first != 0);
  const int ahead = first_chunk + kStages - 1 < end_chunk ? first_chunk + kStages - 1 : end_chunk;
  for (int chunk = first_chunk; chunk < ahead; ++chunk) copies.start_weights(stage(chunk), policy);
  copies.prefetch_weights(a.prefetch < end_chunk - ahead ? a.prefetch : end_chunk - ahead);
  wait_for_previous_kernel();
  for (int chunk = first_chunk; chunk < first_chunk + kStages - 1; ++chunk) {
    if (chunk < ahead) copies.start_rows(stage(chunk));
    commit_copies();  // the first group holds the weights of all stages so far
  }

  typename Shape::Sums sums = {};
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage is there for all, and none still reads the one before
    const int next = chunk + kStages - 1;
    if (next < end_chunk) {
      copies.start_weights(stage(next), policy);
      copies.start_rows(stage(next));
    }
    commit_copies();
    multiply_stage<Format, Shape>(stage(chunk), sums);
  }
  wait_copies<0>();
  __syncthreads();
  if (a.n_splits > 1 && !add_splits<kGroups>(a, sums)) return;
  write_outputs<Shape>(a, tile, sums);
}

// float32 throughout, to check the other types against: a warp computes a feature for eight rows.
__global__ void __launch_bounds__(kThreads)
    linear_f32_kernel(const __grid_constant__ LinearArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Tile tile =
      tile_at(a, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.z) * kRowGroup, kRowGroup);
  const LinearPart& part = *tile.part;
  auto* logits = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* x = static_cast<const float*>(a.x) + Index{tile.first_row} * a.cols;
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < kBlockFeatures; i += kThreads / kWarp) {
    const int feature = tile.block * kBlockFeatures + i;
    if (feature >= part.features) break;
    const float* w = reinterpret_cast<const float*>(part.weight) + Index{feature} * a.cols;
    float sums[kRowGroup] = {};
    for (int k = lane; k < a.cols; k += kWarp) {
      const float weight = w[k];
#pragma unroll
      for (int row = 0; row < kRowGroup; ++row) {
        if (row < tile.n_rows) sums[row] = fmaf(weight, x[Index{row} * a.cols + k], sums[row]);
      }
    }
#pragma unroll
    for (int i_row = 0; i_row < kRowGroup; ++i_row) {
      if (i_row >= tile.n_rows) continue;
      const float sum = warp_sum(sums[i_row]);
      if (lane != 0) continue;
      const float value = part.bias == nullptr ? sum : sum + part.bias[feature];
      if (a.head.runs != nullptr) {
        logits[i_row * kLogitPitch + i] = value;
      } else {
        float* to = part.out + Index{tile.first_row + i_row} * part.features + feature;
        *to = a.accumulate != 0 ? *to + value : value;
      }
    }
  }
  if (a.head.runs == nullptr) return;
  __syncthreads();
  write_runs(a, tile, logits, 0, tile.n_rows);
}

template <typename Format, int kGroups>
void add_launch(Tape& tape, DType dtype, const LinearArgs& args) {
  const Grid grid{
      .x = args.n_blocks,
      .y = args.n_splits,
      .z = ceil_div(args.n_rows, kGroups * kRowGroup),
      .threads = kThreads,
      .shared_bytes = n_stages<Format, kGroups>() * kTileStageBytes<Format, FewRows<kGroups>>};
  tape.add(matmul_work(dtype, args), linear_kernel<Format, kGroups>, grid, args);
}

// The fewest groups of eight rows that hold all; beyond 64 rows, tiles of 64.
int row_groups(int n_rows) { return n_rows <= 8 ? 1 : n_rows <= 16 ? 2 : n_rows <= 32 ? 4 : 8; }

template <typename Format>
void add_launch(Tape& tape, DType dtype, const LinearArgs& args) {
  switch (row_groups(args.n_rows)) {
    case 1: return add_launch<Format, 1>(tape, dtype, args);
    case 2: return add_launch<Format, 2>(tape, dtype, args);
    case 4: return add_launch<Format, 4>(tape, dtype, args);
    default: return add_launch<Format, 8>(tape, dtype, args);
  }
}

}  // namespace

int choose_splits(int n_blocks, int n_chunks, int wanted_blocks) {
  return std::clamp(wanted_blocks / n_blocks, 1, std::max(1, n_chunks / 4));
}

Work matmul_work(DType dtype, const LinearArgs& args) {
  Work work{name(dtype), packed_bytes(dtype, args.n_blocks * double{kBlockFeatures}, args.cols),
            args.cols};
  for (int i = 0; i < args.n_parts; ++i) work.features += args.parts[i].features;
  return work;
}

LinearScratch linear_scratch(const LinearArgs& args) {
  const int groups = row_groups(args.n_rows);
  const auto tiles = static_cast<std::size_t>(ceil_div(args.n_rows, groups * kRowGroup));
  const std::size_t places = tiles * static_cast<std::size_t>(args.n_blocks);
  const auto block_sums = static_cast<std::size_t>(kBlockFeatures * groups * kRowGroup);
  return {places * static_cast<std::size_t>(args.n_splits) * block_sums, places};
}

void linear(Tape& tape, DType dtype, const LinearArgs& args) {
  const auto add = [&](auto format) { add_launch<decltype(format)>(tape, dtype, args); };
  if (with_format(dtype, add)) return;
  tape.add(matmul_work(dtype, args), linear_f32_kernel,
           {.x = args.n_blocks,
            .z = ceil_div(args.n_rows, kRowGroup),
            .threads = kThreads,
            .shared_bytes = kRowGroup * kLogitPitch * static_cast<int>(sizeof(float))},
           args);
}

}  // namespace sbd::cuda
