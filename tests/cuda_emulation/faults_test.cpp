// What only an emulated GPU can show: machines without one, memory that ends, and that the
// emulation finds what it is there to find.
#include <utility>

#include "backend/cuda/cuda.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/warp.h"
#include "child.h"
#include "reference.h"

namespace sbd::cuda {
namespace {

TEST(cuda_without_a_gpu_is_one_line) {
  emulation::options().n_devices = 0;
  CHECK_EQ(why_unavailable(),
           std::string("device cuda: no usable NVIDIA GPU: no CUDA-capable device is detected; use "
                       "device cpu"));
  CHECK_THROWS_WITH(make_backend(0), "no usable NVIDIA GPU");
  emulation::options().n_devices = 2;
  CHECK_EQ(why_unavailable(), std::string());
  CHECK_THROWS_WITH(make_backend(2), "device cuda:2: expected an index below the 2 GPUs here");
  emulation::options().n_devices = 1;
  emulation::options().capability = 7;
  CHECK_THROWS_WITH(make_backend(0),
                    "device cuda:0: emulated has compute capability 7.0, expected 8.0 or higher");
  CHECK(!why_unavailable().empty());  // auto takes the CPU
  emulation::options().capability = 9;
  emulation::options().has_code = false;
  CHECK_THROWS_WITH(make_backend(0),
                    "this build has no code for emulated (compute capability 9.0): no kernel image "
                    "is available for execution on the device; build with "
                    "CMAKE_CUDA_ARCHITECTURES=90, or use device cpu");
  emulation::options().has_code = true;
}

TEST(cuda_out_of_memory_says_what_was_needed_and_free) {
  CudaBackend backend(0);
  const std::size_t before = emulation::options().memory_bytes;
  emulation::options().memory_bytes = emulation::used_bytes() + (10 << 20);
  CHECK_THROWS_WITH(backend.allocate_kv(32, {32, 8, 128}, 1024, DType::f16),
                    "a sequence's KV cache needs 129 MiB, 10 of 1");
  emulation::options().memory_bytes = before;
  backend.allocate_kv(32, {32, 8, 128}, 1024, DType::f16);
}

// Grows a cache to so many positions.
void use_positions(CudaBackend& backend, KvStorage& kv, int n) {
  const int token = 0, position = n - 1;
  const SequenceRows sequence{&kv, 0, 1};
  backend.begin({{&token, 1}, {&position, 1}, {&n, 1}, {&sequence, 1}}, {}, false);
}

TEST(cuda_caches_grow_in_the_memory_that_they_need) {
  CudaBackend backend(0);
  constexpr std::size_t kPageBytes = std::size_t{4} * 2 * 1024 * 32 * 2;  // 4 layers, 1 head of 32
  const auto kv = backend.allocate_kv(4, {1, 1, 32}, 5000, DType::f16);
  use_positions(backend, *kv, 1);
  const std::size_t before = emulation::options().memory_bytes;
  emulation::options().memory_bytes = emulation::used_bytes() + 4 * kPageBytes;
  use_positions(backend, *kv, 5000);
  CHECK_EQ(emulation::used_bytes(), emulation::options().memory_bytes);
  emulation::options().memory_bytes = before;
}

TEST(cuda_caches_ask_for_memory_once) {
  CudaBackend backend(0);
  long calls = 0;
  for (int round = 0; round < 3; ++round) {
    const auto a = backend.allocate_kv(4, {1, 1, 32}, 5000, DType::f16);
    const auto b = backend.allocate_kv(4, {1, 1, 32}, 5000, DType::f16);
    for (const int n : {900, 1025, 4000}) {
      use_positions(backend, *a, n);
      use_positions(backend, *b, n / 2);
    }
    if (round == 0) calls = emulation::n_memory_calls();
  }
  CHECK_EQ(emulation::n_memory_calls(), calls);
}

// What ended caches have left is given back where something else needs it.
TEST(cuda_pages_make_room) {
  CudaBackend backend(0);
  backend.allocate_kv(4, {1, 1, 32}, 5000, DType::f16);
  const std::size_t before = emulation::options().memory_bytes;
  emulation::options().memory_bytes = emulation::used_bytes();
  backend.allocate(100000);
  CHECK_THROWS_WITH(backend.allocate(1000000), "the GPU's memory is too small: a buffer needs");
  emulation::options().memory_bytes = before;
}

TEST(cuda_gives_its_memory_back) {
  const std::size_t before = emulation::used_bytes();
  // Measuring takes time for each multiprocessor and byte.
  const int n_multiprocessors = std::exchange(emulation::options().n_multiprocessors, 1);
  const std::size_t memory = std::exchange(emulation::options().memory_bytes, before + (16 << 20));
  {
    CudaBackend backend(0);
    backend.allocate_kv(2, {4, 2, 16}, 100, DType::f16);
    backend.upload(std::vector<float>(100));
    backend.measure_peaks();
  }
  emulation::options().n_multiprocessors = n_multiprocessors;
  emulation::options().memory_bytes = memory;
  CHECK_EQ(emulation::used_bytes(), before);
}

struct CountArgs {
  int* count;
  bool operator==(const CountArgs&) const = default;
};

void count_kernel(CountArgs a) {
  wait_for_previous_kernel();
  ++*a.count;
}

TEST(cuda_goes_on_where_graphs_have_no_room) {
  const DeviceMemory count(sizeof(int), "a test");
  *count.as<int>() = 0;
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, 0);
  Tape tape;
  tape.add({"count"}, count_kernel, {.threads = 1}, CountArgs{count.as<int>()});
  GraphCache graphs;
  emulation::options().graphs_fit = false;
  for (int i = 0; i < 3; ++i) graphs.run(tape, stream, true);
  CHECK_EQ(graphs.n_replays(), 0);
  emulation::options().graphs_fit = true;
  for (int i = 0; i < 2; ++i) graphs.run(tape, stream, true);
  CHECK_EQ(graphs.n_replays(), 2);
  CHECK_EQ(*count.as<int>(), 5);
  cudaStreamDestroy(stream);
}

// Devices with more shared memory have more stages of a matmul under way.
TEST(cuda_many_rows_are_the_same_bits_in_any_number_of_stages) {
  constexpr int kRows = 300, kCols = 448, kFeatures = 400;
  test::Random random(5);
  const auto stored = test::random_matrix("w", DType::bf16, kFeatures, kCols, 0.1, random);
  const auto x = random.floats(kRows * kCols, -1, 1);
  const auto multiply = [&](std::size_t shared_kib) {
    emulation::options().block_shared_bytes = shared_kib << 10;
    CudaBackend backend(0);
    const auto weight = backend.load_weight(stored.view());
    const Buffer input = backend.upload(x), out = backend.allocate(kRows * kFeatures);
    const std::vector<int> numbers(kRows);
    backend.begin({numbers, numbers, numbers, {}}, {}, false);
    const Linear linear{weight.get(), nullptr, out.get()};
    backend.linear({input.get()}, {&linear, 1}, false, {});
    return backend.download(out.get(), kRows * kFeatures);
  };
  const auto three = multiply(163), four = multiply(227), two = multiply(99);
  CHECK(test::same_bits(two.data(), three.data(), two.size()));
  CHECK(test::same_bits(two.data(), four.data(), two.size()));
}

struct Args {
  float* out;
  int fault;
};

void faulty_kernel(Args a) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  switch (a.fault) {
    case 0: a.out[64] = 1; break;   // beyond the allocation
    case 1: shared[32] = 1; break;  // beyond shared memory
    case 2:
      if (threadIdx.x > 0)
        __syncthreads();
      else
        warp_sum(1.0f);
      break;
    case 3: copy_async(shared, a.out, true); break;  // never waited for
    case 4:
      if (threadIdx.x < 5) warp_sum(1.0f);
      break;         // half a warp
    case 5: return;  // without a wait for the kernel before
    default: break;
  }
  wait_for_previous_kernel();
}

// Does the process that runs the kernel come to a bad end?
bool is_found(int fault) {
  std::string said;
  const auto run = [&] {
    const DeviceMemory out(64 * sizeof(float), "a test");
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, 0);
    launch(faulty_kernel, {.threads = 32, .shared_bytes = 128}, Args{out.as<float>(), fault},
           stream, true);
  };
  return test::in_child(run, &said).killed();
}

TEST(cuda_emulation_finds_faults) {
  for (int fault = 0; fault < 6; ++fault) CHECK_IN(std::to_string(fault), is_found(fault));
  CHECK(!is_found(6));
}

}  // namespace
}  // namespace sbd::cuda
