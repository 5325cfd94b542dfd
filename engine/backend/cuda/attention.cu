// Attention in two kernels: partial softmax over each split of the keys, then their merge.
//
// A block holds 64 queries of one key-value head, 16 a warp, and passes over a split's keys in
// steps of 64 that travel to shared memory while the step before is computed. Scores and
// probabilities stay in registers: what a product leaves in a lane is what the next one wants
// there. The floor is the time to read the cache; at 64 rows and groups of four it is read four
// times, of which the L2 serves three.
#include "backend/cuda/attention.h"

#include "backend/cuda/warp.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kMergeThreads = 128;
constexpr int kStepKeys = 64;
constexpr Work kMerge{"attention merge"};
constexpr float kLog2E = 1.44269504f;

// Where a query's share of a split lies.
__device__ float* partial_at(const AttentionArgs& a, int padded_dim, int split, int row, int head) {
  const Index query = (Index{split} * a.n_rows + (row - a.first_row)) * a.heads + head;
  return a.partials + query * partial_floats(padded_dim);
}

// What a row does not see of the keys before its end.
__device__ Interval unseen_by(const AttentionArgs& a, int row) {
  return a.unseen == nullptr ? Interval{0, 0} : a.unseen[row];
}

struct Tile {
  QueryTileInfo info;
  SequenceInfo sequence;
  int split;
  int kv_head;
  int group;
  int key_begin, key_end;    // of the split
  const std::uint8_t* page;  // that it lies in...
  int page_begin;            // ...from this position on

  __device__ int row(int query) const { return sequence.first_row + query / group; }
  __device__ int head(int query) const { return kv_head * group + query % group; }
};

__device__ Tile tile_at(const AttentionArgs& a) {
  const QueryTileInfo info = a.tiles[a.first_tile + blockIdx.x / a.kv_heads];
  const int split = a.n_splits - 1 - static_cast<int>(blockIdx.y);  // the long ones first
  const int begin = split_begin(split), end = split_begin(split + 1);
  const bool has_keys = begin < info.key_end;
  return {info,
          a.sequences[info.sequence],
          split,
          static_cast<int>(blockIdx.x) % a.kv_heads,
          a.heads / a.kv_heads,
          begin,
          end < info.key_end ? end : info.key_end,
          has_keys ? a.table.page(info.sequence, begin) : nullptr,
          begin / kPagePositions * kPagePositions};
}

// From the page's first position on.
template <typename Value>
__device__ const Value* cache_of(const AttentionArgs& a, const Tile& tile, bool values) {
  const Index head = (Index{a.layer} * 2 + values) * a.kv_heads + tile.kv_head;
  return reinterpret_cast<const Value*>(tile.page) + head * tile.sequence.capacity * a.stride;
}

// The types of a 16-bit cache. Queries and probabilities are rounded to the cache's, which the
// tensor cores multiply as it lies.
struct F16 {
  __device__ static std::uint32_t pair(float low, float high) { return to_halves(low, high); }
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_halves(d, a, b0, b1);
  }
};
struct BF16 {
  __device__ static std::uint32_t pair(float low, float high) { return to_bf16_pair(low, high); }
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    multiply_bf16(d, a, b0, b1);
  }
};

// Shared memory's rows of 16-bit values: 16 bytes modulo 128 apart, so that eight rows of 16 bytes
// lie in different banks.
template <int kDim>
constexpr int kPitch = kDim * 2 + 16;

// Steps of keys and values in shared memory: one where two would be more than the 99 KB that every
// device has, or where no split has two; a multiprocessor then holds more blocks, of this kernel or
// of the matmul behind it, whose weights are on their way meanwhile.
constexpr int n_buffers(int dim, bool long_splits) { return long_splits && dim <= 128 ? 2 : 1; }

// Keys or values of one step; zeros behind head_dim and key_end, so that nothing there is read.
template <int kDim>
__device__ void start_step(const AttentionArgs& a, const Tile& tile, const std::uint16_t* from,
                           int first_key, std::uint8_t* to) {
  constexpr int kPieces = kDim / 8;
  const int real_pieces = a.stride / 8;
  for (int i = threadIdx.x; i < kStepKeys * kPieces; i += kThreads) {
    const int key = i / kPieces, piece = i % kPieces;
    const bool real = first_key + key < tile.key_end && piece < real_pieces;
    const Index at = real ? Index{first_key - tile.page_begin + key} * real_pieces + piece : 0;
    copy_async(to + key * kPitch<kDim> + piece * 16, from + at * 8, real);
  }
}

template <typename Type, int kDim>
__device__ void store_queries(const AttentionArgs& a, const Tile& tile, std::uint8_t* to) {
  for (int i = threadIdx.x; i < kTileQueries * kDim / 2; i += kThreads) {
    const int query = i / (kDim / 2), d = i % (kDim / 2) * 2;
    float low = 0, high = 0;
    if (query < tile.info.n_queries && d < a.head_dim) {  // head_dim is even
      const int packed = tile.info.first_query + query;
      const float* q =
          a.q + (Index{tile.row(packed)} * a.heads + tile.head(packed)) * a.head_dim + d;
      low = q[0], high = q[1];
    }
    *reinterpret_cast<std::uint32_t*>(to + query * kPitch<kDim> + d * 2) = Type::pair(low, high);
  }
}

// A lane's two queries (g and g + 8 of the warp's 16): running maximum and sum.
struct Running {
  float highest = -INFINITY;
  float sum = 0;
};

// A score that is not finite makes its reader NaN: infinity times 0.
__device__ float checked(float score) { return fmaf(score, 0.0f, score); }

template <typename Type, int kDim, int kBuffers>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(const __grid_constant__ AttentionArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Tile tile = tile_at(a);
  if (tile.key_begin >= tile.key_end) return;
  constexpr int kTileBytes = kStepKeys * kPitch<kDim>;
  std::uint8_t* queries = shared_memory();
  std::uint8_t* keys = queries + kTileQueries * kPitch<kDim>;
  std::uint8_t* values = keys + kBuffers * kTileBytes;
  const auto* cached_keys = cache_of<std::uint16_t>(a, tile, false);
  const auto* cached_values = cache_of<std::uint16_t>(a, tile, true);
  const int n_steps = ceil_div(tile.key_end - tile.key_begin, kStepKeys);
  const auto start = [&](int step) {
    const int first_key = tile.key_begin + step * kStepKeys;
    if (step < n_steps) {
      const int at = step % kBuffers * kTileBytes;
      start_step<kDim>(a, tile, cached_keys, first_key, keys + at);
      start_step<kDim>(a, tile, cached_values, first_key, values + at);
    }
    commit_copies();
  };
  start(0);
  store_queries<Type, kDim>(a, tile, queries);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int first_query = warp * 16;
  int key_end[2];
  Interval unseen[2] = {};
  for (int i = 0; i < 2; ++i) {
    const int query = first_query + g + i * 8;
    key_end[i] = 0;
    if (query >= tile.info.n_queries) continue;
    const int row = tile.row(tile.info.first_query + query);
    key_end[i] = a.kv_end[row];
    unseen[i] = unseen_by(a, row);
  }
  const float scale = kLog2E / sqrtf(static_cast<float>(a.head_dim));
  Running running[2];
  float out[kDim / 8][4] = {};

  for (int step = 0; step < n_steps; ++step) {
    if constexpr (kBuffers == 2) start(step + 1);
    wait_copies<kBuffers - 1>();
    __syncthreads();
    const std::uint8_t* k = keys + step % kBuffers * kTileBytes;
    const std::uint8_t* v = values + step % kBuffers * kTileBytes;
    float scores[kStepKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      std::uint32_t q[4];
      load_matrices<false>(
          queries + (first_query + lane % 16) * kPitch<kDim> + d * 2 + lane / 16 * 16, q);
#pragma unroll
      for (int n = 0; n < kStepKeys; n += 16) {
        std::uint32_t b[4];
        load_matrices<false>(
            k + (n + lane / 16 * 8 + lane % 8) * kPitch<kDim> + d * 2 + lane / 8 % 2 * 16, b);
        Type::multiply(scores[n / 8], q, b[0], b[1]);
        Type::multiply(scores[n / 8 + 1], q, b[2], b[3]);
      }
    }

    const int first_key = tile.key_begin + step * kStepKeys + 2 * t;
    float highest[2] = {running[0].highest, running[1].highest};
#pragma unroll
    for (int n = 0; n < kStepKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + n * 8 + i % 2;
        const Interval hidden = unseen[i / 2];
        const bool seen = key < key_end[i / 2] && (key < hidden.begin || key >= hidden.end);
        scores[n][i] = seen ? checked(scores[n][i] * scale) : -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
      }
    }
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAllLanes, highest[i], 1));
      highest[i] = fmaxf(highest[i], __shfl_xor_sync(kAllLanes, highest[i], 2));
      shift[i] = highest[i] == -INFINITY ? 0.0f : highest[i];  // nothing seen yet
      const float factor = exp2_fast(running[i].highest - shift[i]);
      running[i].highest = highest[i];
      running[i].sum *= factor;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[n][2 * i] *= factor;
        out[n][2 * i + 1] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < kStepKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2_fast(scores[n][i] - shift[i / 2]);
        running[i / 2].sum += scores[n][i];
      }
    }
#pragma unroll
    for (int n = 0; n < kStepKeys; n += 16) {
      const float (&low)[4] = scores[n / 8];
      const float (&high)[4] = scores[n / 8 + 1];
      const std::uint32_t p[4] = {Type::pair(low[0], low[1]), Type::pair(low[2], low[3]),
                                  Type::pair(high[0], high[1]), Type::pair(high[2], high[3])};
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        std::uint32_t b[4];
        load_matrices<true>(v + (n + lane % 16) * kPitch<kDim> + d * 2 + lane / 16 * 16, b);
        Type::multiply(out[d / 8], p, b[0], b[1]);
        Type::multiply(out[d / 8 + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();  // the step's memory is free again
    if constexpr (kBuffers == 1) start(step + 1);
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = running[i].sum;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int query = first_query + g + i * 8;
    if (query >= tile.info.n_queries) continue;
    const int packed = tile.info.first_query + query;
    float* partial = partial_at(a, kDim, tile.split, tile.row(packed), tile.head(packed));
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      partial[n * 8 + 2 * t] = out[n][2 * i];
      partial[n * 8 + 2 * t + 1] = out[n][2 * i + 1];
    }
    if (t == 0) {
      partial[kDim] = running[i].highest;
      partial[kDim + 1] = sum;
    }
  }
}

// A float32 cache, to check against: a warp takes one query at a time, a lane one key at a time for
// its score and every 32nd dimension of the sum.
__global__ void __launch_bounds__(kThreads)
    attention_f32_kernel(const __grid_constant__ AttentionArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Tile tile = tile_at(a);
  if (tile.key_begin >= tile.key_end) return;
  const auto* keys = cache_of<float>(a, tile, false);
  const auto* values = cache_of<float>(a, tile, true);
  const int lane = threadIdx.x % kWarp;
  const float scale = kLog2E / sqrtf(static_cast<float>(a.head_dim));
  for (int i = threadIdx.x / kWarp; i < tile.info.n_queries; i += kThreads / kWarp) {
    const int packed = tile.info.first_query + i;
    const int row = tile.row(packed), head = tile.head(packed);
    const int row_end = a.kv_end[row];
    const int key_end = row_end < tile.key_end ? row_end : tile.key_end;
    const Interval hidden = unseen_by(a, row);
    if (tile.key_begin >= key_end) continue;
    const float* q = a.q + (Index{row} * a.heads + head) * a.head_dim;
    Running running;
    float out[kMaxHeadDim / kWarp] = {};
    for (int first = tile.key_begin; first < key_end; first += kWarp) {
      const int key = first + lane;
      float score = -INFINITY;
      if (key < key_end && (key < hidden.begin || key >= hidden.end)) {
        float sum = 0;
        const float* k = keys + Index{key - tile.page_begin} * a.stride;
        for (int d = 0; d < a.head_dim; ++d) sum = fmaf(q[d], k[d], sum);
        score = checked(sum * scale);
      }
      const float highest = fmaxf(running.highest, warp_max(score));
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float factor = exp2f(running.highest - shift);
      const float p = exp2f(score - shift);
      running.sum = running.sum * factor + warp_sum(p);
      running.highest = highest;
      const int n_keys = key_end - first < kWarp ? key_end - first : kWarp;
#pragma unroll
      for (int j = 0; j < kMaxHeadDim / kWarp; ++j) out[j] *= factor;
      for (int n = 0; n < n_keys; ++n) {
        const float weight = __shfl_sync(kAllLanes, p, n);
        const float* v = values + Index{first - tile.page_begin + n} * a.stride;
#pragma unroll
        for (int j = 0; j < kMaxHeadDim / kWarp; ++j) {
          const int d = lane + j * kWarp;
          if (d < a.head_dim) out[j] = fmaf(weight, v[d], out[j]);
        }
      }
    }
    float* partial = partial_at(a, kMaxHeadDim, tile.split, row, head);
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / kWarp; ++j) partial[lane + j * kWarp] = out[j];
    if (lane == 0) {
      partial[kMaxHeadDim] = running.highest;
      partial[kMaxHeadDim + 1] = running.sum;
    }
  }
}

// A block: a head of a row. The splits' factors are found side by side, then their sums are added
// in order, a thread for a dimension.
template <int kDim>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ AttentionArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto* factors = reinterpret_cast<float*>(shared_memory());  // [splits]
  float* scratch = factors + a.n_splits;
  const int row = a.first_row + static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int n_splits = splits_of(a.kv_end[row]);
  const float* first = partial_at(a, kDim, 0, row, head);
  const Index pitch = Index{a.n_rows} * a.heads * partial_floats(kDim);  // from a split to the next
  const int thread = static_cast<int>(threadIdx.x);
  float highest = -INFINITY;
  for (int split = thread; split < n_splits; split += kMergeThreads) {
    highest = fmaxf(highest, first[split * pitch + kDim]);
  }
  highest = block_reduce(warp_max(highest), scratch, -INFINITY,
                         [](float x, float y) { return fmaxf(x, y); });
  float sum = 0;
  for (int split = thread; split < n_splits; split += kMergeThreads) {
    const float* partial = first + split * pitch;
    // Equal maxima are factor 1, also where all scores were NaN and both are -infinity.
    factors[split] = partial[kDim] == highest ? 1.0f : exp2f(partial[kDim] - highest);
    sum = fmaf(factors[split], partial[kDim + 1], sum);
  }
  sum = block_sum(sum, scratch);  // and the factors are there for all
  for (int d = thread; d < a.head_dim; d += kMergeThreads) {
    float value = 0;
#pragma unroll 8
    for (int split = 0; split < n_splits; ++split) {
      value = fmaf(factors[split], first[split * pitch + d], value);
    }
    a.out[(Index{row} * a.heads + head) * a.head_dim + d] = value / sum;
  }
}

template <typename Type, int kDim, bool kLongSplits>
void add_products(Tape& tape, const AttentionArgs& args, const Work& work) {
  constexpr int kBuffers = n_buffers(kDim, kLongSplits);
  tape.add(work, attention_kernel<Type, kDim, kBuffers>,
           {.x = args.n_tiles * args.kv_heads,
            .y = args.n_splits,
            .threads = kThreads,
            .shared_bytes = (kTileQueries + 2 * kBuffers * kStepKeys) * kPitch<kDim>},
           args);
}

template <typename Type, int kDim>
void add_launches(Tape& tape, const AttentionArgs& args, const Work& work, const Grid& merge) {
  static_assert(kShortSplit <= kStepKeys);
  if (args.n_splits > kShortSplits) {
    add_products<Type, kDim, true>(tape, args, work);
  } else {
    add_products<Type, kDim, false>(tape, args, work);
  }
  tape.add(kMerge, merge_kernel<kDim>, merge, args);
}

template <typename Type>
void add_launches_for_dim(Tape& tape, const AttentionArgs& args, const Work& work,
                          const Grid& merge) {
  if (args.head_dim <= 64) return add_launches<Type, 64>(tape, args, work, merge);
  if (args.head_dim <= 128) return add_launches<Type, 128>(tape, args, work, merge);
  add_launches<Type, 256>(tape, args, work, merge);
}

}  // namespace

void attention(Tape& tape, const AttentionArgs& args, double cache_bytes) {
  const Work work{"attention", cache_bytes};
  const Grid merge{
      .x = args.n_rows,
      .y = args.heads,
      .threads = kMergeThreads,
      .shared_bytes = (args.n_splits + kMergeThreads / kWarp) * static_cast<int>(sizeof(float))};
  if (args.kv_dtype == DType::f16) return add_launches_for_dim<F16>(tape, args, work, merge);
  if (args.kv_dtype == DType::bf16) return add_launches_for_dim<BF16>(tape, args, work, merge);
  tape.add(work, attention_f32_kernel,
           {.x = args.n_tiles * args.kv_heads, .y = args.n_splits, .threads = kThreads}, args);
  tape.add(kMerge, merge_kernel<kMaxHeadDim>, merge, args);
}

}  // namespace sbd::cuda
