// Random weights are made on the device, and are the CPU's.
#include <numeric>

#include "backend/cpu/cpu_backend.h"
#include "cuda_check.h"

namespace sbd::cuda {
namespace {

using namespace test;

constexpr int kRows = 130, kCols = 256;

Buffer embed_all(Backend& backend, const Weight& weight) {
  std::vector<int> rows(kRows);
  std::iota(rows.begin(), rows.end(), 0);
  Buffer out = backend.allocate(kRows * kCols);
  backend.begin({rows, rows, rows, {}}, {}, false);
  backend.embed(weight, nullptr, out.get());
  return out;
}

TEST(cuda_random_weights_are_the_cpus) {
  CudaBackend gpu(0);
  cpu::CpuBackend cpu(1);
  for (const DType dtype : kDTypes) {
    const auto on_cpu = cpu.random_weight(dtype, kRows, kCols, 3);
    const Buffer expected = embed_all(cpu, *on_cpu);
    const auto on_gpu = gpu.random_weight(dtype, kRows, kCols, 3);
    const auto got = gpu.download(embed_all(gpu, *on_gpu).get(), kRows * kCols);
    // What becomes halves: subnormal ones where it is small.
    const bool rounds = on_gpu->dtype() != dtype;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double value = expected.get()[i];
      CHECK_NEAR(got[i], value, rounds ? std::abs(value) * 0x1p-11 + 0x1p-25 : 0.0);
    }
  }
}

}  // namespace
}  // namespace sbd::cuda
