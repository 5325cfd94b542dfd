// CudaBackend: the floor under its forwards, measured.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/units.h"
#include "backend/cuda/warp.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTries = 5;

struct DotsArgs {
  float* sink;
  int rounds;
  bool operator==(const DotsArgs&) const = default;
};

constexpr int kChains = 8;  // independent, so that latency does not show

// Nothing but bf16 products: an m16n8k16 each chain and round.
__global__ void peak_bf16(DotsArgs a) {
  float sums[kChains][4] = {};
  const std::uint32_t one = 0x3f803f80u;
  const std::uint32_t operand[4] = {one, one, one, one};
  for (int i = 0; i < a.rounds; ++i) {
#pragma unroll
    for (float (&sum)[4] : sums) multiply_bf16(sum, operand, one, one);
  }
  float total = 0;
  for (const float (&sum)[4] : sums) total += sum[0];
  if (total < 0) *a.sink = total;  // never: but nothing is optimised away
}

__global__ void peak_f32(DotsArgs a) {
  float sums[kChains];
  for (int j = 0; j < kChains; ++j) sums[j] = static_cast<float>(threadIdx.x + j);
  for (int i = 0; i < a.rounds; ++i) {
#pragma unroll
    for (float& sum : sums) sum = fmaf(sum, 0.5f, 1.0f);
  }
  float total = 0;
  for (const float sum : sums) total += sum;
  if (total < 0) *a.sink = total;
}

struct ReadArgs {
  const uint4* from;
  std::uint32_t* sink;
  Index n_vectors;
  bool operator==(const ReadArgs&) const = default;
};

constexpr int kReadsAtOnce = 8;

// Nothing but reads, sixteen bytes each.
__global__ void __launch_bounds__(kThreads) peak_read(ReadArgs a) {
  const Index stride = Index{gridDim.x} * kThreads;
  std::uint32_t all = 0;
  for (Index first = Index{blockIdx.x} * kThreads + threadIdx.x; first < a.n_vectors;
       first += kReadsAtOnce * stride) {
    uint4 read[kReadsAtOnce];
#pragma unroll
    for (int i = 0; i < kReadsAtOnce; ++i) {
      const Index at = first + i * stride;
      read[i] = a.from[at < a.n_vectors ? at : first];
    }
#pragma unroll
    for (const uint4& q : read) all |= q.x | q.y | q.z | q.w;
  }
  if (all == 1) *a.sink = all;  // never
}

template <typename Work>
double seconds(cudaStream_t stream, Work work) {
  Event begin, end;
  begin.record(stream);
  work();
  end.record(stream);
  return std::max(microseconds(begin, end), 1e-3) * 1e-6;
}

// The most of `amount` a second that a few tries of work reach.
template <typename Work>
double best_rate(double amount, cudaStream_t stream, Work work) {
  double best = 0;
  for (int i = 0; i < kTries; ++i) best = std::max(best, amount / seconds(stream, work));
  return best;
}

// The same, of rounds of `amount` each, as many as take a millisecond or more.
template <typename Work>
double best_rate_of_rounds(double amount, cudaStream_t stream, Work work) {
  int rounds = 64;
  while (rounds < 1 << 20 && seconds(stream, [&] { work(rounds); }) < 1e-3) rounds *= 2;
  return best_rate(amount * rounds, stream, [&] { work(rounds); });
}

}  // namespace

Peaks CudaBackend::measure_peaks() {
  finish();
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "asking for its free memory");
  const std::size_t bytes = std::min<std::size_t>(std::size_t{1} << 30, available / 2) / 16 * 16;
  const DeviceMemory memory(bytes, "measuring");
  check(cudaMemsetAsync(memory.data(), 0x5a, bytes, stream_), "measuring");
  const Grid grid{.x = 4 * shape_.n_multiprocessors, .threads = kThreads};
  const ReadArgs reads{memory.as<uint4>(), memory.as<std::uint32_t>(),
                       static_cast<Index>(bytes / 16)};
  Peaks peaks;
  peaks.read = best_rate(static_cast<double>(bytes), stream_,
                         [&] { launch(peak_read, grid, reads, stream_, false); });
  const double threads = static_cast<double>(grid.x) * grid.threads;
  constexpr double kProducts = 2.0 * 16 * 8 * 16 / kWarp;  // operations of a lane's share
  const auto dots = [&](auto kernel, double operations) {
    return best_rate_of_rounds(operations * kChains * threads, stream_, [&](int rounds) {
      launch(kernel, grid, DotsArgs{memory.as<float>(), rounds}, stream_, false);
    });
  };
  peaks.bf16 = dots(peak_bf16, kProducts);
  peaks.f32 = dots(peak_f32, 2);
  peaks.f16 = peaks.int8 = peaks.bf16;  // halves, and quants as such: at the same rate
  return peaks;
}

}  // namespace sbd::cuda
