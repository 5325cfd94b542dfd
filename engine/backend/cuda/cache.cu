// Heads normed and turned, keys and values stored: one pass between the matmul and attention.
#include "backend/cuda/attention.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kLanePairs = kMaxHeadDim / 2 / kWarp;

__global__ void angles_kernel(AnglesArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= a.n_angles) return;
  const int row = i / a.n_frequencies;
  // Rounded to float32 before the cosine, as everywhere: the angle is the model's.
  const float angle = static_cast<float>(a.positions[row]) * a.frequencies[i % a.n_frequencies];
  sincosf(angle, a.angles + 2 * i + 1, a.angles + 2 * i);
}

// A warp: a head of a row, queries first, then keys, then values.
__global__ void cache_kernel(const __grid_constant__ CacheArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int units = a.heads + 2 * a.kv_heads;
  const int task = static_cast<int>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (task >= a.n_rows * units) return;
  const int lane = threadIdx.x % kWarp;
  const Index row = task / units;
  const int unit = task % units;
  const bool is_query = unit < a.heads, is_value = unit >= a.heads + a.kv_heads;
  const int kv_head = is_value ? unit - a.heads - a.kv_heads : unit - a.heads;
  float* query = a.q + (row * a.heads + unit) * a.head_dim;
  const float* source =
      is_query ? query : (is_value ? a.v : a.k) + (row * a.kv_heads + kv_head) * a.head_dim;

  // A lane's pairs are those that RoPE turns.
  const int n_pairs = a.head_dim / 2;
  const bool apart = !is_value && a.interleaved == 0;
  const auto low_at = [&](int i) { return apart ? i : 2 * i; };
  const auto high_at = [&](int i) { return apart ? i + n_pairs : 2 * i + 1; };
  float low[kLanePairs], high[kLanePairs];
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) {
    const int i = lane + j * kWarp;
    low[j] = i < n_pairs ? source[low_at(i)] : 0.0f;
    high[j] = i < n_pairs ? source[high_at(i)] : 0.0f;
  }
  const float* norm = is_query ? a.q_norm : is_value ? nullptr : a.k_norm;
  if (norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) squares += low[j] * low[j] + high[j] * high[j];
    const float mean = warp_sum(squares) / static_cast<float>(a.head_dim);
    const float factor = 1.0f / sqrtf(mean + a.eps);
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
      const int i = lane + j * kWarp;
      if (i >= n_pairs) continue;
      low[j] *= factor * norm[low_at(i)];
      high[j] *= factor * norm[high_at(i)];
    }
  }
  const float scale = is_query && a.query_scale != nullptr ? a.query_scale[row] : 1.0f;
  const int sequence = a.row_sequence[row], place = a.places[row];
  const Index element = a.kv_dtype == DType::f32 ? 4 : 2;
  const Index plane = (Index{a.layer} * 2 + is_value) * a.kv_heads + kv_head;
  const Index at = plane * a.sequences[sequence].capacity + place % kPagePositions;
  std::uint8_t* cached = a.table.page(sequence, place) + at * a.stride * element;
  const auto store = [&](int i, float x) {
    if (is_query) {
      query[i] = x * scale;
    } else if (a.kv_dtype == DType::f32) {
      reinterpret_cast<float*>(cached)[i] = x;
    } else {
      const std::uint32_t pair = a.kv_dtype == DType::bf16 ? to_bf16_pair(x, x) : to_halves(x, x);
      reinterpret_cast<std::uint16_t*>(cached)[i] = static_cast<std::uint16_t>(pair);
    }
  };
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) {
    const int i = lane + j * kWarp;
    if (i >= n_pairs) continue;
    float x = low[j], y = high[j];
    if (!is_value) {
      const float cosine = a.angles[2 * (row * n_pairs + i)],
                  sine = a.angles[2 * (row * n_pairs + i) + 1];
      const float turned = x * cosine - y * sine;
      y = x * sine + y * cosine;
      x = turned;
    }
    store(low_at(i), x);
    store(high_at(i), y);
  }
}

}  // namespace

void angles(Tape& tape, const AnglesArgs& args) {
  tape.add({"angles"}, angles_kernel, {.x = ceil_div(args.n_angles, kThreads), .threads = kThreads},
           args);
}

void rotate_and_cache(Tape& tape, const CacheArgs& args) {
  const int tasks = args.n_rows * (args.heads + 2 * args.kv_heads);
  tape.add({"rotate and cache"}, cache_kernel,
           {.x = ceil_div(tasks, kThreads / kWarp), .threads = kThreads}, args);
}

}  // namespace sbd::cuda
