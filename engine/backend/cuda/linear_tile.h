// What both families of matmul kernels do with a tile of 128 features by some rows: a stage of 64
// inputs into shared memory, its products, and what becomes of the sums.
//
// Weights are the tensor cores' first operand (16 features), rows their second (8 rows), so that
// one row costs no more than eight. In a stage rows lie [2 steps][rows][32 inputs]: what a warp
// reads at a time, eight rows of a step, are 512 consecutive bytes, 16 for each lane, as a tile of
// weights is (formats.h). So neither operand meets a bank twice, and ldmatrix would save nothing.
#pragma once

#include "backend/cuda/asked_rows.h"
#include "backend/cuda/formats.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/run_stats.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

inline constexpr int kRowGroup = 8;
inline constexpr int kPieceBytes = 16;              // of a copy, and of a lane's operand
inline constexpr int kStepBytes = kStepInputs * 2;  // of a row
inline constexpr int kChunkBytes = kChunk * 2;
// Of a tile's logits in shared memory: the four pairs of rows that a warp writes at a time, 8
// features each, lie in different banks.
inline constexpr int kLogitPitch = kBlockFeatures + 4;

// The warps of a thread block, side by side over features and over rows.
template <int kFeatureWarps_, int kRowWarps_, int kGroups_>
struct TileShape {
  static constexpr int kFeatureWarps = kFeatureWarps_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kGroups = kGroups_;  // of eight rows, a warp's
  static constexpr int kWarpRows = kGroups * kRowGroup;
  static constexpr int kRows = kRowWarps * kWarpRows;
  static constexpr int kWarpTiles = kBlockTiles / kFeatureWarps;  // of 16 features
  static constexpr int kThreads = kFeatureWarps * kRowWarps * kWarp;
  using Sums = float[kWarpTiles][kGroups][4];

  __device__ static int feature_warp() {
    return static_cast<int>(threadIdx.x) / kWarp % kFeatureWarps;
  }
  __device__ static int row_warp() { return static_cast<int>(threadIdx.x) / kWarp / kFeatureWarps; }
};

// A stage in shared memory: weights, what their super-block shares, rows, and of each the sums of
// both steps, which minima multiply.
template <typename Format>
constexpr int kWeightBytes = Format::kStageBytes + Format::kSuperBytes;
inline constexpr int kRowSumBytes = kChunkSteps * 4;
template <typename Format, typename Shape>
constexpr int kTileStageBytes =
    kWeightBytes<Format> + Shape::kRows * (kChunkBytes + (Format::kHasMins ? kRowSumBytes : 0));

struct Tile {  // what a thread block computes
  const LinearPart* part;
  int block;  // of the part
  int first_row, n_rows;
};

// block: of all parts
__device__ inline Tile tile_at(const LinearArgs& a, int block, int first_row, int tile_rows) {
  int i = 0;
  while (i + 1 < a.n_parts && block >= a.parts[i + 1].first_block) ++i;
  const int left = a.n_rows - first_row;
  return {&a.parts[i], block - a.parts[i].first_block, first_row,
          left < tile_rows ? left : tile_rows};
}

// A thread's share of the copies of stages, one after the other. Rows behind the last are zeros,
// and nothing is read where they would be.
template <typename Format, typename Shape>
class Copies {
 public:
  __device__ Copies(const LinearArgs& a, const Tile& tile, int first_chunk)
      : pitch_(Index{a.n_chunks} * kChunkBytes), real_rows_(tile.n_rows - first_row()) {
    weights_ = tile.part->weight + tile.block * stage_at<Format>(a.n_chunks) +
               stage_at<Format>(first_chunk) + first_byte();
    if constexpr (Format::kSuperBytes > 0) chunk_ = first_chunk % kSuperChunks;
    if constexpr (Format::kHasMins) {
      row_sums_ = reinterpret_cast<const std::uint8_t*>(a.step_sums) +
                  ((Index{tile.first_row} + threadIdx.x) * a.n_chunks + first_chunk) * kRowSumBytes;
    }
    rows_ = static_cast<const std::uint8_t*>(a.x) + (tile.first_row + first_row()) * pitch_ +
            Index{first_chunk} * kChunkBytes + first_byte() % kStepBytes;
  }

  __device__ void start_weights(std::uint8_t* stage) {
    start_weights(stage, [](void* to, const void* from) { copy_async(to, from, true); });
  }
  __device__ void start_weights(std::uint8_t* stage, CachePolicy policy) {
    start_weights(stage, [policy](void* to, const void* from) { copy_async(to, from, policy); });
  }

  // The next so many stages of weights, into L2; of a K-quant, a few bytes less.
  __device__ void prefetch_weights(int n_stages) const {
    constexpr int kLine = 128, kAtOnce = Shape::kThreads * kLine;
    const std::uint8_t* next = weights_ - first_byte();
    const Index n_bytes = Index{n_stages} * Format::kStageBytes;
    for (Index at = static_cast<Index>(threadIdx.x) * kLine; at < n_bytes; at += kAtOnce) {
      prefetch_line(next + at);
    }
  }

  __device__ void start_rows(std::uint8_t* stage) {
    constexpr int kAtOnce = Shape::kThreads * kPieceBytes / kStepBytes;
    std::uint8_t* to = stage + kWeightBytes<Format> + first_byte();
    const std::uint8_t* from = rows_;
#pragma unroll
    for (int row = 0; row < Shape::kRows; row += kAtOnce) {
#pragma unroll
      for (int step = 0; step < kChunkSteps; ++step) {
        if (row + kAtOnce <= Shape::kRows || row + first_row() < Shape::kRows) {
          copy_async(to + (step * Shape::kRows + row) * kStepBytes, from + step * kStepBytes,
                     row < real_rows_);
        }
      }
      from += kAtOnce * pitch_;
    }
    rows_ += kChunkBytes;
    if constexpr (Format::kHasMins) {
      static_assert(Shape::kRows <= Shape::kThreads);
      const int row = static_cast<int>(threadIdx.x);
      if (row < Shape::kRows) {
        std::uint8_t* sums = stage + kWeightBytes<Format> + Shape::kRows * kChunkBytes;
        copy_eight_async(sums + row * kRowSumBytes, row_sums_, row - first_row() < real_rows_);
      }
      row_sums_ += kRowSumBytes;
    }
  }

 private:
  template <typename Copy>
  __device__ void start_weights(std::uint8_t* stage, Copy copy) {
    constexpr int kAtOnce = Shape::kThreads * kPieceBytes;
#pragma unroll
    for (int at = 0; at < Format::kStageBytes; at += kAtOnce) {
      if (at + kAtOnce <= Format::kStageBytes || at + first_byte() < Format::kStageBytes) {
        copy(stage + first_byte() + at, weights_ + at);
      }
    }
    if constexpr (Format::kSuperBytes > 0) {
      // With every stage, so that one is all that its products need: three times of four from L2.
      static_assert(Format::kSuperBytes <= kAtOnce);
      if (first_byte() < Format::kSuperBytes) {
        copy(stage + Format::kStageBytes + first_byte(),
             weights_ + (kSuperChunks - chunk_) * Format::kStageBytes);
      }
      chunk_ = (chunk_ + 1) % kSuperChunks;
      if (chunk_ == 0) weights_ += Format::kSuperBytes;
    }
    weights_ += Format::kStageBytes;
  }

  __device__ static int first_byte() { return static_cast<int>(threadIdx.x) * kPieceBytes; }
  __device__ static int first_row() { return first_byte() / kStepBytes; }

  Index pitch_;  // of rows
  int real_rows_;
  const std::uint8_t* weights_;
  const std::uint8_t* rows_;
  [[maybe_unused]] const std::uint8_t* row_sums_;
  [[maybe_unused]] int chunk_;  // of its super-block
};

// Of two rows, with the features g and g + 8.
__device__ inline void add_scaled(float (&sum)[4], const float (&products)[4],
                                  const float (&scale)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = fmaf(products[i], scale[i / 2], sum[i]);
}

// In one order for every shape: so a row's result does not depend on the tile it is in.
template <typename Format, typename Shape>
__device__ void multiply_stage(const std::uint8_t* stage, typename Shape::Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::uint8_t* rows = stage + kWeightBytes<Format> +
                             Shape::row_warp() * Shape::kWarpRows * kStepBytes + lane * kPieceBytes;
  // Of the lane's two rows of a group, both steps'.
  [[maybe_unused]] const std::uint8_t* row_sums =
      stage + kWeightBytes<Format> + Shape::kRows * kChunkBytes +
      (Shape::row_warp() * Shape::kWarpRows + lane % 4 * 2) * kRowSumBytes;
  // Where sums leave few registers, a step's quants wait until the last step's products are done.
  constexpr bool kFull = sizeof(sums) / sizeof(float) == 128;
  [[maybe_unused]] constexpr int kStepsAtOnce = kFull && Format::kScaled ? 1 : kChunkSteps;
#pragma unroll(kStepsAtOnce)
  for (int step = 0; step < kChunkSteps; ++step) {
    uint4 row[Shape::kGroups];
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      row[group] = *reinterpret_cast<const uint4*>(
          rows + (step * Shape::kRows + group * kRowGroup) * kStepBytes);
    }
#pragma unroll
    for (int t = 0; t < Shape::kWarpTiles; ++t) {
      const int tile = Shape::feature_warp() * Shape::kWarpTiles + t;
      TileOperand weights;
      Format::load(stage, tile, step, lane, weights);
      [[maybe_unused]] Factors factors{};
      if constexpr (Format::kScaled) {
        factors = Format::factors(stage, stage + Format::kStageBytes, tile, step, lane);
      }
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group) {
        float (&sum)[4] = sums[t][group];
        if constexpr (Format::kScaled) {
          float products[4] = {};
          Format::multiply(products, weights[0], row[group].x, row[group].y);
          if constexpr (Format::kTwoScales) {
            add_scaled(sum, products, factors.scale[0]);
            for (float& product : products) product = 0;
          }
          Format::multiply(products, weights[1], row[group].z, row[group].w);
          add_scaled(sum, products, factors.scale[Format::kTwoScales ? 1 : 0]);
          if constexpr (Format::kHasMins) {
            const uint4 of_rows =
                *reinterpret_cast<const uint4*>(row_sums + group * kRowGroup * kRowSumBytes);
            const float first = __uint_as_float(step == 0 ? of_rows.x : of_rows.y);
            const float second = __uint_as_float(step == 0 ? of_rows.z : of_rows.w);
            const float of_both[4] = {first, second, first, second};
            add_scaled(sum, of_both, {-factors.min[0], -factors.min[1]});
          }
        } else {
          Format::multiply(sum, weights[0], row[group].x, row[group].y);
          Format::multiply(sum, weights[1], row[group].z, row[group].w);
        }
      }
    }
  }
}

// The LM head's: of some of a tile's rows, whose logits lie in shared memory, the run of 128.
__device__ inline void write_runs(const LinearArgs& a, const Tile& tile, float* logits,
                                  int first_row, int n_rows) {
  const int first_id = tile.block * kBlockFeatures, left = tile.part->features - first_id;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int n_warps = static_cast<int>(blockDim.x) / kWarp;
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < n_rows; i += n_warps) {
    const Index row = tile.first_row + first_row + i;
    float* mine = logits + i * kLogitPitch;
    if (a.head.asks != nullptr) {
      const AskedRow& ask = a.head.asks[row];
      const int n = left < kBlockFeatures ? left : kBlockFeatures;
      if (a.head.ranks != 0) {
        count_before(ask, mine, first_id, n);
        continue;
      }
      ask_run(ask, mine, first_id, n, tile.block);
    }
    const RunStats run =
        run_stats<kBlockFeatures>(mine, first_id, tile.part->features, a.head.mask_token);
    if (lane == 0) a.head.runs[row * a.n_blocks + tile.block] = run;
    if (tile.part->out == nullptr) continue;
    for (int j = lane; j < kBlockFeatures && first_id + j < tile.part->features; j += kWarp) {
      tile.part->out[row * tile.part->features + first_id + j] = mine[j];
    }
  }
}

// The end of a kernel. Of an LM head, the logits of a warp's rows at a time go through shared
// memory, which the stages leave, to a warp for each row.
template <typename Shape>
__device__ void write_outputs(const LinearArgs& a, const Tile& tile, typename Shape::Sums& sums) {
  constexpr int kFeatures = Shape::kWarpTiles * 2, kRows = Shape::kGroups * 2;  // of a thread
  const LinearPart& part = *tile.part;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int in_block = Shape::feature_warp() * Shape::kWarpTiles * kTileFeatures + lane / 4;
  const int first_feature = tile.block * kBlockFeatures + in_block;
  const int first_row = Shape::row_warp() * Shape::kWarpRows + lane % 4 * 2;
  const int n_features = part.features - first_feature, n_rows = tile.n_rows - first_row;
  const auto row_at = [](int i) { return i / 2 * kRowGroup + i % 2; };
  // Of some of the thread's rows: f(sum, row and feature beside the thread's first ones)
  const auto for_each_sum = [&](int begin, int end, auto f) {
#pragma unroll
    for (int i = begin; i < end; ++i) {
#pragma unroll
      for (int j = 0; j < kFeatures; ++j) {
        if (row_at(i) < n_rows && j * 8 < n_features) {
          f(sums[j / 2][i / 2][j % 2 * 2 + i % 2], row_at(i), j * 8);
        }
      }
    }
  };
  if (a.row_scale != nullptr) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row_at(i) >= n_rows) continue;
      const float scale = a.row_scale[tile.first_row + first_row + row_at(i)];
#pragma unroll
      for (int j = 0; j < kFeatures; ++j) sums[j / 2][i / 2][j % 2 * 2 + i % 2] *= scale;
    }
  }
  if (part.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kFeatures; ++j) {
      if (j * 8 >= n_features) continue;
      const float bias = part.bias[first_feature + j * 8];
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[j / 2][i / 2][j % 2 * 2 + i % 2] += bias;
    }
  }
  if (a.head.runs == nullptr) {
    float* out = part.out + Index{tile.first_row + first_row} * part.features + first_feature;
    // What is added is read before anything is written, so that those reads are under way together.
    constexpr int kRowsAtOnce = kRows < 4 ? kRows : 4;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      if (a.accumulate != 0) {
        for_each_sum(i, i + kRowsAtOnce, [&](float& sum, int row, int feature) {
          sum += out[Index{row} * part.features + feature];
        });
      }
      for_each_sum(i, i + kRowsAtOnce, [&](float sum, int row, int feature) {
        out[Index{row} * part.features + feature] = sum;
      });
    }
    return;
  }
  auto* logits = reinterpret_cast<float*>(shared_memory());
  for (int i = 0; i < Shape::kRowWarps && i * Shape::kWarpRows < tile.n_rows; ++i) {
    const int left = tile.n_rows - i * Shape::kWarpRows;
    __syncthreads();
    if (Shape::row_warp() == i) {
      for_each_sum(0, kRows, [&](float sum, int row, int feature) {
        logits[(lane % 4 * 2 + row) * kLogitPitch + in_block + feature] = sum;
      });
    }
    __syncthreads();
    write_runs(a, tile, logits, i * Shape::kWarpRows,
               left < Shape::kWarpRows ? left : Shape::kWarpRows);
  }
}

}  // namespace sbd::cuda
