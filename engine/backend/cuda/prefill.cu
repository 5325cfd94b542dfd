// Many rows. What limits them is the tensor cores: mma.sync keeps them busy with some 5 products of
// 16 x 8 x 16 in 8 cycles on a multiprocessor of an H100, 1.6 cycles each (wgmma: 1, an A100: 2).
//
// A warp takes 64 features by 64 rows, 128 registers of sums. For 32 inputs it reads 4 KB of bf16
// weights and 4 KB of rows from shared memory for 64 products: 128 bytes each, one cycle of
// the 1.6. Copies into it are 48 bytes a product in a tile of 128 features by 256 rows (8 warps),
// and 64 in one by 128 rows (4 warps): 30 and 40 bytes a cycle, of which L2 gives an H100's
// multiprocessor some 25 to 30. So the wide tile is the better one where there are enough of them
// to go round. Either way 8 warps of at most 255 registers fill a multiprocessor: one block, or
// two.
//
// Weights come out of the same stages as for few rows. A scheduler has 6.5 cycles for a product, in
// which bf16 takes 1.9 instructions and quants 5: one to make halves, two to scale the sums. Q6_K,
// Q4_K and Q5_K take 9 to 10, four of which scale sums and add minima, and are limited by these.
// (Quants also leave no registers for what the copies need: it waits in local memory, some 5 to 15
// reads and writes for 128 products, and 80 to 150 with minima.)
//
// Blocks go down some row tiles of one block of features, then of the next, so that those that run
// at the same time share weights and rows in L2.
//
// No tile splits the inputs. So where few rows are split (linear.h), a row's results among many are
// of another order of summation, and differ by rounding: a prompt in chunks of other sizes, or a
// sequence that decodes beside many others, may meet the other family. Otherwise, and within a
// family, the bits are the same.
#include <algorithm>

#include "backend/cuda/linear_tile.h"

namespace sbd::cuda {

namespace {

constexpr int kFewRows = 64;
constexpr int kMaxStages = 4;
constexpr int kBandTiles = 8;  // of rows, which blocks go down before the next features

template <int kRowWarps>
using ManyRows = TileShape<2, kRowWarps, 8>;
using NarrowTile = ManyRows<2>;
using WideTile = ManyRows<4>;

struct PrefillArgs {
  LinearArgs linear;
  int n_stages;
  int n_row_tiles;
  bool operator==(const PrefillArgs&) const = default;
};

template <typename Shape>
__device__ Tile tile_of_block(const PrefillArgs& p) {
  const int id = static_cast<int>(blockIdx.x), band_blocks = kBandTiles * p.linear.n_blocks;
  const int first = id / band_blocks * kBandTiles, in_band = id % band_blocks;
  const int left = p.n_row_tiles - first;
  const int n = left < kBandTiles ? left : kBandTiles;
  return tile_at(p.linear, in_band / n, (first + in_band % n) * Shape::kRows, Shape::kRows);
}

// Until all stages but the youngest n have come.
__device__ void wait_stages(int n) {
  switch (n) {
    case 0: return wait_copies<0>();
    case 1: return wait_copies<1>();
    default: return wait_copies<kMaxStages - 2>();
  }
}

template <typename Format, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    prefill_kernel(const __grid_constant__ PrefillArgs p) {
  const LinearArgs& a = p.linear;
  const Tile tile = tile_of_block<Shape>(p);
  const auto stage = [&](int slot) {
    return shared_memory() + slot * kTileStageBytes<Format, Shape>;
  };
  Copies<Format, Shape> copies(a, tile, 0);

  // As in linear.cu.
  let_next_kernel_start();
  const int ahead = p.n_stages - 1;
  for (int i = 0; i < ahead && i < a.n_chunks; ++i) copies.start_weights(stage(i));
  wait_for_previous_kernel();
  for (int i = 0; i < ahead; ++i) {
    if (i < a.n_chunks) copies.start_rows(stage(i));
    commit_copies();
  }

  typename Shape::Sums sums = {};
  const bool has_rows = Shape::row_warp() * Shape::kWarpRows < tile.n_rows;
  int slot = 0, next_slot = ahead;
  for (int chunk = 0; chunk < a.n_chunks; ++chunk) {
    wait_stages(p.n_stages - 2);
    __syncthreads();
    if (chunk + ahead < a.n_chunks) {
      copies.start_weights(stage(next_slot));
      copies.start_rows(stage(next_slot));
    }
    commit_copies();
    if (has_rows) multiply_stage<Format, Shape>(stage(slot), sums);
    slot = slot == ahead ? 0 : slot + 1;
    next_slot = next_slot == ahead ? 0 : next_slot + 1;
  }
  wait_copies<0>();
  __syncthreads();
  write_outputs<Shape>(a, tile, sums);
}

// At least two stages, which are at most 96 KB: what every device from sm_80 on has.
template <typename Format, typename Shape>
void add_launch(Tape& tape, DType dtype, const LinearArgs& args, int shared_bytes) {
  constexpr int kStageBytes = kTileStageBytes<Format, Shape>;
  static_assert(2 * kStageBytes <= 96 * 1024);
  static_assert(Shape::kWarpRows * kLogitPitch * sizeof(float) <= 2 * kStageBytes);
  const int n_stages = std::clamp(shared_bytes / kStageBytes, 2, kMaxStages);
  const int n_row_tiles = ceil_div(args.n_rows, Shape::kRows);
  tape.add(matmul_work(dtype, args), prefill_kernel<Format, Shape>,
           {.x = args.n_blocks * n_row_tiles,
            .threads = Shape::kThreads,
            .shared_bytes = n_stages * kStageBytes},
           PrefillArgs{args, n_stages, n_row_tiles});
}

template <typename Shape>
int n_rounds(const LinearArgs& args, const DeviceShape& device) {
  return ceil_div(args.n_blocks * ceil_div(args.n_rows, Shape::kRows), device.n_multiprocessors);
}

// A narrow tile is half the work of a wide one and, as copies limit it, takes two thirds of the
// time.
template <typename Format>
void add_launch(Tape& tape, DType dtype, const LinearArgs& args, const DeviceShape& device) {
  if (2 * n_rounds<NarrowTile>(args, device) < 3 * n_rounds<WideTile>(args, device)) {
    // Two blocks on a multiprocessor, where it has room; 1 KB of each is the system's.
    add_launch<Format, NarrowTile>(
        tape, dtype, args,
        std::min(device.block_shared_bytes, device.multiprocessor_shared_bytes / 2 - 1024));
  } else {
    add_launch<Format, WideTile>(tape, dtype, args, device.block_shared_bytes);
  }
}

}  // namespace

// The kernel for few rows, in tiles of 64, copies 96 bytes a product and so reaches half the speed
// of this one at best; but it splits the inputs of a weight too small to fill the device. So this
// one pays from half a device on.
bool prefill_pays(DType dtype, const LinearArgs& args, const DeviceShape& device) {
  if (dtype == DType::f32 || args.n_rows <= kFewRows) return false;
  const int n_tiles = args.n_blocks * ceil_div(args.n_rows, NarrowTile::kRows);
  return 2 * n_tiles >= device.n_multiprocessors;
}

void prefill(Tape& tape, DType dtype, const LinearArgs& args, const DeviceShape& device) {
  with_format(dtype, [&](auto format) { add_launch<decltype(format)>(tape, dtype, args, device); });
}

}  // namespace sbd::cuda
