#include "backend/cuda/prepare.h"

#include "backend/cuda/units.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;

// Halves hold 2^-14 to 2^15 in full precision, and a row may lie anywhere: divided by this power of
// two, which is exact, its largest value lies in [1024, 2048).
__device__ float scale_of(float largest) {
  if (!(largest > 0) || isinf(largest)) return 1.0f;
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  const int shift = exponent < -100 ? -110 : exponent - 10;
  return __uint_as_float(static_cast<unsigned>(shift + 127) << 23);
}

// A block: a row, read twice (a norm's, a scale's and the output's pass), the later times from L1
// or L2: rows are at most 76 KB.
__global__ void prepare_kernel(PrepareArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const Index row = blockIdx.x;
  const Index source = a.source_rows == nullptr ? row : a.source_rows[row];
  const float* x = a.x + source * a.cols;
  const float* up = a.up == nullptr ? nullptr : a.up + source * a.cols;

  float factor = 1;
  if (a.norm_weight != nullptr) {
    float squares = 0;
    for (int i = threadIdx.x; i < a.cols; i += kThreads) squares += x[i] * x[i];
    const float mean = block_sum(squares, scratch) / static_cast<float>(a.cols);
    factor = 1.0f / sqrtf(mean + a.eps);
  }
  const auto value = [&](int i) {
    float y = x[i];
    if (a.norm_weight != nullptr) y = y * factor * a.norm_weight[i];
    if (up != nullptr) y = y / (1.0f + expf(-y)) * up[i];
    return y;
  };
  float inverse_scale = 1;
  if (a.halves != nullptr) {
    float largest = 0;
    for (int i = threadIdx.x; i < a.cols; i += kThreads) largest = fmaxf(largest, fabsf(value(i)));
    const float scale = scale_of(block_max(largest, scratch));
    inverse_scale = 1.0f / scale;
    if (threadIdx.x == 0) a.half_scale[row] = scale;
  }
  for (int i = 2 * threadIdx.x; i < a.padded_cols; i += 2 * kThreads) {
    const float low = i < a.cols ? value(i) : 0.0f;
    const float high = i + 1 < a.cols ? value(i + 1) : 0.0f;
    if (a.values != nullptr && i < a.cols) {
      a.values[row * a.cols + i] = low;
      if (i + 1 < a.cols) a.values[row * a.cols + i + 1] = high;
    }
    const Index pair = (row * a.padded_cols + i) / 2;
    if (a.bf16 != nullptr) reinterpret_cast<std::uint32_t*>(a.bf16)[pair] = to_bf16_pair(low, high);
    if (a.halves != nullptr) {
      reinterpret_cast<std::uint32_t*>(a.halves)[pair] =
          to_halves(low * inverse_scale, high * inverse_scale);
    }
  }
}

__global__ void mix_kernel(MixArgs a) {  // a block: some columns of a row
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Index row = blockIdx.y;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= a.cols) return;
  const Mix from = a.mixes[row];
  float sum = 0;
  if (from.a != 0) sum += from.a * a.x[Index{from.x_row} * a.cols + i];
  if (from.b != 0) sum += from.b * a.y[Index{from.y_row} * a.cols + i];
  a.out[row * a.cols + i] = sum;
}

}  // namespace

void prepare(Tape& tape, const PrepareArgs& args, int n_rows) {
  tape.add(prepare_kernel, {.x = n_rows, .threads = kThreads, .shared_bytes = kThreads / kWarp * 4},
           args);
}

void mix(Tape& tape, const MixArgs& args, int n_rows) {
  tape.add(mix_kernel, {.x = ceil_div(args.cols, kThreads), .y = n_rows, .threads = kThreads},
           args);
}

}  // namespace sbd::cuda
