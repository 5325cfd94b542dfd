// The emulated tensor core against the PTX ISA's formulas for who holds which element
// ("Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix"), written as they stand
// there.
#include "backend/cuda/ptx.h"

#include "backend/cuda/runtime.h"
#include "check.h"
#include "reference.h"

namespace sbd::cuda {
namespace {

using namespace test;

constexpr int kLanes = 32, kM = 16, kN = 8, kK = 16;

struct At {
  int row, column;
};

At a_at(int lane, int i) {  // 0 <= i < 8
  const int group = lane >> 2, in_group = lane % 4;
  const bool first_rows = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {first_rows ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
At b_at(int lane, int i) {  // 0 <= i < 4
  const int group = lane >> 2, in_group = lane % 4;
  return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
}
At c_at(int lane, int i) {  // 0 <= i < 4
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

struct PtxArgs {
  const std::uint16_t* a;  // [16][16]
  const std::uint16_t* b;  // [16][8]
  std::uint32_t* loaded;   // [lanes][8]: a's registers, then b's twice
  float* d;                // [lanes][4]
  bool bf16;
};

void kernel(PtxArgs x) {
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x);
  auto* a = reinterpret_cast<std::uint16_t*>(shared_memory());  // rows of 16 bytes and more
  auto* b = a + kM * kK;
  for (int i = lane; i < kM * kK; i += kLanes) a[i] = x.a[i];
  for (int i = lane; i < kK * kN; i += kLanes) b[i] = x.b[i];
  __syncthreads();
  std::uint32_t of_a[4], of_b[4];
  // Matrices in the order of a's registers: rows 0-7 and 8-15 of columns 0-7, then of 8-15.
  load_matrices<false>(a + lane % 16 * kK + lane / 16 * 8, of_a);
  // b's rows 0-7 and 8-15, twice.
  load_matrices<true>(b + lane % 16 * kN, of_b);
  for (int i = 0; i < 4; ++i) {
    x.loaded[lane * 8 + i] = of_a[i];
    x.loaded[lane * 8 + 4 + i] = of_b[i];
  }
  std::uint32_t mine[4], b_pairs[2];
  for (int i = 0; i < 4; ++i) {
    const At low = a_at(lane, 2 * i), high = a_at(lane, 2 * i + 1);
    mine[i] = x.a[low.row * kK + low.column] |
              static_cast<std::uint32_t>(x.a[high.row * kK + high.column]) << 16;
  }
  for (int i = 0; i < 2; ++i) {
    const At low = b_at(lane, 2 * i), high = b_at(lane, 2 * i + 1);
    b_pairs[i] = x.b[low.row * kN + low.column] |
                 static_cast<std::uint32_t>(x.b[high.row * kN + high.column]) << 16;
  }
  float d[4] = {1, 2, 3, 4};
  if (x.bf16) {
    multiply_bf16(d, mine, b_pairs[0], b_pairs[1]);
  } else {
    multiply_halves(d, mine, b_pairs[0], b_pairs[1]);
  }
  for (int i = 0; i < 4; ++i) x.d[lane * 4 + i] = d[i];
}

// Values that both 16-bit types hold, and whose products' sums float32 does.
std::uint16_t bits_of(int value, bool bf16) {
  return bf16 ? to_bf16_bits(static_cast<float>(value)) : to_half_bits(static_cast<float>(value));
}

TEST(cuda_emulated_fragments_are_the_ptx_isas) {
  for (const bool bf16 : {false, true}) {
    Random random(9);
    int a[kM][kK], b[kK][kN];
    const DeviceMemory a_bits(kM * kK * 2, "a test"), b_bits(kK * kN * 2, "a test");
    const DeviceMemory loaded(kLanes * 8 * 4, "a test"), d(kLanes * 4 * 4, "a test");
    for (int i = 0; i < kM * kK; ++i) {
      a[i / kK][i % kK] = random.below(201) - 100;
      a_bits.as<std::uint16_t>()[i] = bits_of(a[i / kK][i % kK], bf16);
    }
    for (int i = 0; i < kK * kN; ++i) {
      b[i / kN][i % kN] = random.below(201) - 100;
      b_bits.as<std::uint16_t>()[i] = bits_of(b[i / kN][i % kN], bf16);
    }
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, 0);
    launch(kernel, {.threads = kLanes, .shared_bytes = (kM * kK + kK * kN) * 2},
           PtxArgs{a_bits.as<std::uint16_t>(), b_bits.as<std::uint16_t>(),
                   loaded.as<std::uint32_t>(), d.as<float>(), bf16},
           stream, true);
    cudaStreamDestroy(stream);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const At at = c_at(lane, i);
        int sum = i + 1;
        for (int k = 0; k < kK; ++k) sum += a[at.row][k] * b[k][at.column];
        CHECK_EQ(d.as<float>()[lane * 4 + i], static_cast<float>(sum));
      }
      for (int i = 0; i < 16; ++i) {
        const std::uint32_t pair = loaded.as<std::uint32_t>()[lane * 8 + i / 2];
        const At at = i < 8 ? a_at(lane, i) : b_at(lane, (i - 8) % 4);
        const int expected = i < 8 ? a[at.row][at.column] : b[at.row][at.column];
        CHECK_EQ(pair >> (i % 2 * 16) & 0xffffu, std::uint32_t{bits_of(expected, bf16)});
      }
    }
  }
}

struct ReduceArgs {
  const float* x;  // [lanes]
  float* sums;     // [lanes][2]: at once, and by the shuffles that ptx.h has
};

void reduce_kernel(ReduceArgs a) {
  wait_for_previous_kernel();
  const unsigned lane = threadIdx.x;
  float sum = a.x[lane];
  a.sums[2 * lane] = warp_reduce(sum, [](float x, float y) { return x + y; });
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  a.sums[2 * lane + 1] = sum;
}

TEST(cuda_emulated_reductions_are_those_of_shuffles) {
  Random random(3);
  const DeviceMemory x(kLanes * 4, "a test"), sums(kLanes * 2 * 4, "a test");
  for (int i = 0; i < kLanes; ++i) x.as<float>()[i] = static_cast<float>(random.uniform(-1, 1));
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, 0);
  launch(reduce_kernel, {.threads = kLanes}, ReduceArgs{x.as<float>(), sums.as<float>()}, stream,
         true);
  cudaStreamDestroy(stream);
  const float* all = sums.as<float>();
  for (int i = 0; i < 2 * kLanes; ++i) CHECK_EQ(all[i], all[0]);
  float in_order = 0;
  for (int i = 0; i < kLanes; ++i) in_order += x.as<float>()[i];
  CHECK(all[0] != in_order);  // so that another order would be seen
  CHECK_NEAR(all[0], in_order, 1e-5);
}

TEST(cuda_emulated_halves_are_the_nearest) {
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float value = half_to_float(static_cast<std::uint16_t>(bits));
    const float next =
        bits + 1 < 0x7c00 ? half_to_float(static_cast<std::uint16_t>(bits + 1)) : 65536;
    const float middle = (value + next) / 2;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const auto nearest = [&](float x) { return to_half_bits(sign == 0 ? x : -x) - sign; };
      CHECK_EQ(nearest(value), bits);
      CHECK_EQ(nearest(std::nextafter(middle, 0.0f)), bits);
      CHECK_EQ(nearest(middle), bits + bits % 2);
      CHECK_EQ(nearest(std::nextafter(middle, INFINITY)), bits + 1);
    }
  }
  CHECK_EQ(to_half_bits(INFINITY), 0x7c00);
  CHECK_EQ(to_half_bits(-1e30f), 0xfc00);
  CHECK(std::isnan(half_to_float(to_half_bits(NAN))));
}

}  // namespace
}  // namespace sbd::cuda
