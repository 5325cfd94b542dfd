// CpuBackend: the floor under its forwards, measured.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "backend/cpu/cpu_backend.h"

namespace sbd::cpu {

namespace {

// The most of what `work` does, a second, in a few tries.
template <typename Work>
double best_rate(Work work) {
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double done = work();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, done / seconds.count());
  }
  return best;
}

}  // namespace

Peaks CpuBackend::measure_peaks() {
  constexpr Index kPiece = 1 << 20;
  constexpr int kPieces = 256;  // together more than the caches of most machines
  const Pages pages(std::size_t{kPiece} * kPieces, /*huge=*/true);
  pool_.run(kPieces,
            [&](int piece, int) { std::memset(pages.data() + piece * kPiece, 1, kPiece); });
  std::atomic<std::uint64_t> sink{0};  // used, so that nothing is optimised away
  const auto operations = [&](DType dtype) {
    constexpr int kTasks = 64;
    constexpr Index kRounds = 256;
    return best_rate([&] {
      std::atomic<Index> done{0};
      pool_.run(kTasks, [&](int, int) {
        float total;
        done += kernels_.peak_dots(dtype, kRounds, &total);
        sink += total > 0;
      });
      return static_cast<double>(done.load());
    });
  };
  Peaks peaks;
  peaks.read = best_rate([&] {
    pool_.run(kPieces, [&](int piece, int) {
      sink += kernels_.peak_read(pages.data() + piece * kPiece, kPiece);
    });
    return static_cast<double>(pages.size());
  });
  peaks.int8 = operations(DType::q8_0);
  peaks.bf16 = operations(DType::bf16);
  peaks.f32 = operations(DType::f32);
  peaks.f16 = peaks.f32;  // halves are multiplied as floats
  return peaks;
}

}  // namespace sbd::cpu
