#include "backend/cuda/prepare.h"

#include <algorithm>

#include "backend/cuda/units.h"
#include "backend/cuda/warp.h"
#include "core/bytes.h"

namespace sbd::cuda {

namespace {

constexpr int kMixThreads = 256;
constexpr int kMaxThreads = 1024;
// Pairs of neighbouring columns that a thread reads before it uses any: memory's latency is met
// once for all, where a loop that stores each value before it reads the next meets it every time.
constexpr int kPairs = 4;

// Halves hold 2^-14 to 2^15 in full precision, and a row may lie anywhere: divided by this power of
// two, which is exact, its largest value lies in [1024, 2048).
__device__ float scale_of(float largest) {
  if (!(largest > 0) || isinf(largest)) return 1.0f;
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  const int shift = exponent < -100 ? -110 : exponent - 10;
  return __uint_as_float(static_cast<unsigned>(shift + 127) << 23);
}

// A block: a row, or where no value depends on another one, blockIdx.y's strip of it.
struct RowPart {
  const PrepareArgs& a;
  const float* x;
  const float* up;
  int first, end;  // columns, padding included
  float factor;    // of the norm

  __device__ int strip() const { return 2 * kPairs * static_cast<int>(blockDim.x); }
  __device__ float value(float y, float gate_up, float norm) const {
    if (a.norm_weight != nullptr) y = y * factor * norm;
    if (up != nullptr) y = y / (1.0f + expf(-y)) * gate_up;
    return y;
  }

  // Calls f(column, value, the next column's value) for this thread's pairs, zeros behind cols.
  template <typename F>
  __device__ void for_each_pair(F f) const {
    for (int begin = first; begin < end; begin += strip()) {
      const int column = begin + 2 * static_cast<int>(threadIdx.x);
      const auto at = [&](int i) {  // within the row
        const int wanted = column + i / 2 * 2 * static_cast<int>(blockDim.x) + i % 2;
        return wanted < a.cols ? wanted : a.cols - 1;
      };
      float values[2 * kPairs], ups[2 * kPairs] = {}, norms[2 * kPairs] = {};
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) values[i] = x[at(i)];
      if (up != nullptr) {
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) ups[i] = up[at(i)];
      }
      if (a.norm_weight != nullptr) {
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) norms[i] = a.norm_weight[at(i)];
      }
#pragma unroll
      for (int i = 0; i < 2 * kPairs; i += 2) {
        const int k = column + i * static_cast<int>(blockDim.x);
        if (k >= end) continue;
        f(k, k < a.cols ? value(values[i], ups[i], norms[i]) : 0.0f,
          k + 1 < a.cols ? value(values[i + 1], ups[i + 1], norms[i + 1]) : 0.0f);
      }
    }
  }
};

__global__ void __launch_bounds__(kMaxThreads)
    prepare_kernel(const __grid_constant__ PrepareArgs a) {
  let_next_kernel_start();
  if (a.norm_weight != nullptr) {  // long gone from the caches: a forward reads gigabytes
    for (int i = threadIdx.x * 32; i < a.cols; i += 32 * static_cast<int>(blockDim.x)) {
      prefetch_line(a.norm_weight + i);
    }
  }
  wait_for_previous_kernel();
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const Index row = blockIdx.x;
  const Index source = (a.source_rows == nullptr ? row : a.source_rows[row]) * Index{a.cols};
  RowPart part{a, a.x + source, a.up == nullptr ? nullptr : a.up + source, 0, a.padded_cols, 1};
  if (gridDim.y > 1) {
    part.first = static_cast<int>(blockIdx.y) * part.strip();
    part.end = part.first + part.strip() < part.end ? part.first + part.strip() : part.end;
  }

  if (a.norm_weight != nullptr) {
    float squares = 0;
#pragma unroll 2 * kPairs
    for (int i = threadIdx.x; i < a.cols; i += static_cast<int>(blockDim.x)) {
      squares += part.x[i] * part.x[i];
    }
    const float mean = block_sum(squares, scratch) / static_cast<float>(a.cols);
    part.factor = 1.0f / sqrtf(mean + a.eps);
  }
  float inverse_scale = 1;
  if (a.halves != nullptr) {
    float largest = 0;
    part.for_each_pair([&](int, float low, float high) {
      largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(high)));
    });
    const float scale = scale_of(block_max(largest, scratch));
    inverse_scale = 1.0f / scale;
    if (threadIdx.x == 0) a.half_scale[row] = scale;
  }
  part.for_each_pair([&](int k, float low, float high) {
    if (a.values != nullptr && k < a.cols) {
      a.values[row * a.cols + k] = low;
      if (k + 1 < a.cols) a.values[row * a.cols + k + 1] = high;
    }
    const Index at = row * a.padded_cols + k;
    const Index pair = (at - k % kStepInputs + place_in_step(k)) / 2;
    if (a.bf16 != nullptr) reinterpret_cast<std::uint32_t*>(a.bf16)[pair] = to_bf16_pair(low, high);
    if (a.halves == nullptr) return;
    const std::uint32_t halves = to_halves(low * inverse_scale, high * inverse_scale);
    reinterpret_cast<std::uint32_t*>(a.halves)[pair] = halves;
    if (a.step_sums == nullptr) return;
    // Sixteen lanes have a step, and all of a warp are here: padded columns fill it.
    float sum = low_half(halves) + high_half(halves);
    for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (k % kStepInputs == 0) a.step_sums[at / kStepInputs] = sum;
  });
}

__global__ void mix_kernel(MixArgs a) {  // a block: some columns of a row
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Index row = blockIdx.x;
  const int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (i >= a.cols) return;
  const Mix from = a.mixes[row];
  float sum = 0;
  if (from.a != 0) sum += from.a * a.x[Index{from.x_row} * a.cols + i];
  if (from.b != 0) sum += from.b * a.y[Index{from.y_row} * a.cols + i];
  a.out[row * a.cols + i] = a.scale * sum;
}

}  // namespace

// One strip is a row of up to 8192 columns that must be in one block, and 2048 columns otherwise:
// a single row is then work for several multiprocessors.
void prepare(Tape& tape, const PrepareArgs& args, int n_rows) {
  const bool whole_rows = args.norm_weight != nullptr || args.halves != nullptr;
  const int wanted = round_up(ceil_div(args.padded_cols, 2 * kPairs), kWarp);
  const int threads = std::min(wanted, whole_rows ? kMaxThreads : 256);
  const char* what = args.norm_weight != nullptr ? "norm" : args.up != nullptr ? "swiglu" : "round";
  tape.add({what}, prepare_kernel,
           {.x = n_rows,
            .y = whole_rows ? 1 : ceil_div(args.padded_cols, 2 * kPairs * threads),
            .threads = threads,
            .shared_bytes = threads / kWarp * static_cast<int>(sizeof(float))},
           args);
}

void mix(Tape& tape, const MixArgs& args, int n_rows) {
  tape.add({"mix"}, mix_kernel,
           {.x = n_rows, .y = ceil_div(args.cols, kMixThreads), .threads = kMixThreads}, args);
}

}  // namespace sbd::cuda
