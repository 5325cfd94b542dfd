// A GPU in software, exact in what it computes and strict in what it allows, so that kernels are
// tested on machines without one. Every thread of a block is a fiber; blocks run one after the
// other. Found are: reads and writes beyond an allocation (a page without access lies behind each)
// or after its end, memory that nothing wrote (it is NaN), asynchronous copies that nothing waits
// for (they land only then), threads at different barriers, threads of overlapping kernels that do
// not wait for the kernel before, and most missing barriers: the order in which threads run can be
// turned round (SBD_EMULATION_ORDER=descending), and the tests pass in both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

enum class Order { ascending, descending };

struct Options {
  int n_devices = 1;
  int capability = 9;
  bool graphs_fit = true;  // has the device memory for them?
  bool has_code = true;    // does the build have code that the device runs?
  int n_multiprocessors = 8;
  std::size_t block_shared_bytes = 99 << 10;  // on the smallest device that is built for
  std::size_t memory_bytes = std::size_t{1} << 32;
  long good_launches =
      -1;  // kernels that run before one fails, as what reads a wrong address does:
           // seen by the next call that waits, and by all from then on; -1: all
  Order order = Order::ascending;  // of the threads of a block, between two barriers
};
Options& options();

std::size_t used_bytes();  // of the device's memory
long n_memory_calls();     // that asked for some, or gave it back
long n_launches();         // of kernels, replays of graphs included
long n_prefetches();
bool lost();  // has a kernel failed?

struct Index3 {
  unsigned x, y, z;
};
extern Index3 thread_index, block_index, block_size, grid_size;

std::uint8_t* shared_memory();
void block_barrier();

// All lanes of a warp meet: each gives a pointer to what it brings, and `work` is done once, on
// those of all lanes, before any goes on. `kind` says what they meet for, and must be the same.
using WarpWork = void (*)(void* const* lanes);
void meet_warp(const char* kind, void* mine, WarpWork work);
// They meet, too: returns what lane `from` brings.
std::uint64_t shuffle_bits(std::uint64_t mine, int from);

// A tensor core's: sums += a b.
void add_products(const double (&a)[16][16], const double (&b)[16][8], double (&sums)[16][8]);

void prefetch(const void* global);  // must be there to be read
void copy_async(void* shared, const void* global, unsigned bytes, bool real);
void commit_copies();
void wait_copies(int youngest);

void wait_for_previous_kernel();

// `overlaps`: may the kernel start before the end of the one before it?
void run_grid(Index3 grid, Index3 block, std::size_t shared_bytes, bool overlaps,
              const std::function<void()>& kernel);

[[noreturn]] void stop(const char* what);  // a fault of the kernel: says where and aborts

}  // namespace emulation
