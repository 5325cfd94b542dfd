#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kLanes = 32;
constexpr std::uint32_t kAllLanes = 0xffffffff;

// Memory that ends where a page without access begins, full of NaN.
class GuardedPages {
 public:
  GuardedPages(std::size_t bytes, std::size_t alignment) : bytes_(bytes) {
    const std::size_t inside = (bytes + alignment - 1) / alignment * alignment;
    pages_ = (inside + kPage - 1) / kPage * kPage;
    base_ = static_cast<std::uint8_t*>(mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) stop("no memory for the emulation");
    mprotect(base_ + pages_, kPage, PROT_NONE);
    data_ = base_ + pages_ - inside;
    std::memset(data_, 0xff, inside);
  }
  ~GuardedPages() { munmap(base_, pages_ + kPage); }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::size_t pages_;
  std::uint8_t* base_;
  std::uint8_t* data_;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool real;
};

struct Warp {
  std::uint32_t running = 0;  // a bit for each lane that has not ended
  std::uint32_t ready = 0;    // ... and waits for nobody
  int arrived = 0;            // of its lanes, where they meet
  const char* kind = nullptr;
  void* lanes[kLanes] = {};
  unsigned turn = 0;  // of what is handed round
  std::uint64_t handed[2][kLanes] = {};
};

// Where something goes on that has been left.
#if defined(__x86_64__)
using Context = void*;  // a stack, on which lie the registers that a call keeps

// Jumps, as a return to where no call came from is guessed wrongly by the processor.
extern "C" void emulation_switch(void** save, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulation_switch, .-emulation_switch
)");

void switch_context(Context& from, Context& to) { emulation_switch(&from, to); }

Context new_context(std::uint8_t* stack, std::size_t bytes, void (*run)()) {
  auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15};
  auto* slots = reinterpret_cast<void**>(top);
  *--slots = nullptr;  // where a return address would be: the stack is aligned as after a call
  *--slots = reinterpret_cast<void*>(run);
  for (int i = 0; i < 6; ++i) *--slots = nullptr;
  return slots;
}
#else
using Context = ucontext_t;

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

Context new_context(std::uint8_t* stack, std::size_t bytes, void (*run)()) {
  Context context;
  getcontext(&context);
  context.uc_stack = {stack, 0, bytes};
  context.uc_link = nullptr;
  makecontext(&context, run, 0);
  return context;
}
#endif

struct Fiber {
  Context context{};
  Index3 index{};
  Warp* warp = nullptr;
  int lane = 0;
  bool finished = true;
  bool has_waited = false;               // for the kernel before
  std::vector<Copy> copies;              // not committed
  std::deque<std::vector<Copy>> groups;  // oldest first
  std::unique_ptr<std::uint8_t[]> stack;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
int at_barrier = 0;
int n_running = 0;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::unique_ptr<GuardedPages> shared;
bool must_wait = false;  // for the kernel before
long launches = 0;
long prefetches = 0;
bool device_is_lost = false;

Context scheduler;

// A warp's lanes, in order, each of which runs until it waits.
struct Walk {
  const Warp* warp = nullptr;
  const std::unique_ptr<Fiber>* fibers = nullptr;  // the warp's
  std::uint32_t ahead = 0;                         // a bit for each lane that it has not come to
  bool ascending = true;
};
Walk walk;

// The next lane that can go on.
Fiber* next_fiber() {
  const std::uint32_t lanes = walk.warp->ready & walk.ahead;
  if (lanes == 0) return nullptr;
  const int lane = walk.ascending ? std::countr_zero(lanes) : kLanes - 1 - std::countl_zero(lanes);
  const std::uint32_t bit = std::uint32_t{1} << lane;
  walk.ahead &= walk.ascending ? ~(bit | (bit - 1)) : bit - 1;
  return walk.fibers[lane].get();
}

void switch_to(Context& from, Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  switch_context(from, fiber.context);
}

// Straight to the next lane: by way of the scheduler would be two switches.
void pause() {
  Fiber& from = *current;
  if (Fiber* next = next_fiber()) {
    switch_to(from.context, *next);
  } else {
    switch_context(from.context, scheduler);
  }
}

void run_fiber_body() {
  (*body)();
  current->finished = true;
  switch_context(current->context, scheduler);
  std::abort();
}

void finish_copies(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.real) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
}

std::uint32_t bit_of(const Fiber& fiber) { return std::uint32_t{1} << fiber.lane; }

void open_barrier() {
  at_barrier = 0;
  for (Warp& warp : warps) warp.ready = warp.running;
}

// Is this lane the last of its warp to come? It goes on at once, the others when it has come.
bool comes_last(Warp& warp, const char* kind) {
  if (warp.running != kAllLanes) stop("a warp's instruction without all of its lanes");
  if (warp.arrived == 0) {
    warp.kind = kind;
  } else if (warp.kind != kind && std::strcmp(warp.kind, kind) != 0) {
    stop("the lanes of a warp are at different instructions");
  }
  warp.ready &= ~bit_of(*current);
  if (++warp.arrived < kLanes) return false;
  warp.arrived = 0;
  warp.ready = kAllLanes;
  return true;
}

void end_thread(Fiber& fiber) {
  for (const auto& group : fiber.groups) {
    if (!group.empty()) stop("a copy that nothing waited for");
  }
  if (!fiber.copies.empty()) stop("a copy that was never committed");
  if (must_wait && !fiber.has_waited) stop("the kernel before may still run at this one's end");
  fiber.groups.clear();
  --n_running;
  fiber.warp->running &= ~bit_of(fiber);
  fiber.warp->ready &= ~bit_of(fiber);
  // Threads that have ended do not keep the others from their barrier.
  if (at_barrier > 0 && at_barrier == n_running) open_barrier();
}

// Runs the threads of a warp once, each as far as it gets; false where none could go on.
bool run_warp(int warp) {
  bool moved = false;
  walk = {&warps[static_cast<std::size_t>(warp)], &fibers[static_cast<std::size_t>(warp) * kLanes],
          kAllLanes, options().order == Order::ascending};
  while (Fiber* next = next_fiber()) {
    moved = true;
    switch_to(scheduler, *next);
    if (current->finished) end_thread(*current);
  }
  return moved;
}

// Each warp runs until the block's barrier stops it, so that warps are as far apart as barriers
// allow. A round in which none could go on is a fault.
void run_block(int n_threads) {
  at_barrier = 0;
  n_running = n_threads;
  std::memset(shared->data(), 0xff, shared->size());
  for (Warp& warp : warps) warp = {};
  for (int i = 0; i < n_threads; ++i) {
    Fiber& fiber = *fibers[static_cast<std::size_t>(i)];
    fiber.finished = false;
    fiber.has_waited = false;
    fiber.warp = &warps[static_cast<std::size_t>(i / kLanes)];
    fiber.lane = i % kLanes;
    fiber.warp->running |= bit_of(fiber);
    fiber.warp->ready = fiber.warp->running;
    // Stacks that began at equal places of their pages would share a few lines of the cache.
    fiber.context =
        new_context(fiber.stack.get(), kStackBytes - fiber.index.x * 192 % kPage, &run_fiber_body);
  }
  const int n_warps = (n_threads + kLanes - 1) / kLanes;
  while (n_running > 0) {
    bool moved = false;
    for (int i = 0; i < n_warps; ++i) {
      const int warp = options().order == Order::ascending ? i : n_warps - 1 - i;
      while (run_warp(warp)) moved = true;
    }
    if (!moved) stop("threads wait at different barriers");
  }
}

std::size_t memory_in_use = 0;
long memory_calls = 0;
std::deque<std::unique_ptr<GuardedPages>> allocations;

}  // namespace

Index3 thread_index, block_index, block_size, grid_size;

Options& options() {
  static Options all = [] {
    Options from_environment;
    const char* order = std::getenv("SBD_EMULATION_ORDER");
    if (order != nullptr && std::strcmp(order, "descending") == 0) {
      from_environment.order = Order::descending;
    }
    return from_environment;
  }();
  return all;
}

std::size_t used_bytes() { return memory_in_use; }
long n_memory_calls() { return memory_calls; }
long n_launches() { return launches; }
long n_prefetches() { return prefetches; }
bool lost() { return device_is_lost; }

std::uint8_t* shared_memory() { return shared->data(); }

void stop(const char* what) {
  std::fprintf(stderr, "emulated GPU, block (%u, %u, %u) thread %u: %s\n", block_index.x,
               block_index.y, block_index.z, thread_index.x, what);
  std::abort();
}

void block_barrier() {
  current->warp->ready &= ~bit_of(*current);
  if (++at_barrier == n_running) {
    open_barrier();
  } else {
    pause();
  }
}

void meet_warp(const char* kind, void* mine, WarpWork work) {
  Warp& warp = *current->warp;
  warp.lanes[current->lane] = mine;
  if (comes_last(warp, kind)) {
    work(warp.lanes);
  } else {
    pause();
  }
}

// Two turns' values are kept: none of the warp's lanes ends a turn before all have read the last.
std::uint64_t shuffle_bits(std::uint64_t mine, int from) {
  Warp& warp = *current->warp;
  const std::uint64_t* values = warp.handed[warp.turn & 1];
  warp.handed[warp.turn & 1][current->lane] = mine;
  if (comes_last(warp, "shuffle")) {
    ++warp.turn;
  } else {
    pause();
  }
  return values[from];
}

#if defined(__x86_64__)
__attribute__((target_clones("avx2", "default")))
#endif
void add_products(const double (&a)[16][16], const double (&b)[16][8], double (&sums)[16][8]) {
  using Four = double __attribute__((vector_size(4 * sizeof(double))));
  Four low, high, b_low, b_high;  // copied, as the arrays are not aligned for it
  for (int row = 0; row < 16; ++row) {
    std::memcpy(&low, sums[row], sizeof low);
    std::memcpy(&high, sums[row] + 4, sizeof high);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(&b_low, b[k], sizeof b_low);
      std::memcpy(&b_high, b[k] + 4, sizeof b_high);
      low += a[row][k] * b_low;
      high += a[row][k] * b_high;
    }
    std::memcpy(sums[row], &low, sizeof low);
    std::memcpy(sums[row] + 4, &high, sizeof high);
  }
}

void prefetch(const void* global) {
  static_cast<void>(*static_cast<const volatile std::uint8_t*>(global));
  ++prefetches;
}

void copy_async(void* to, const void* from, unsigned bytes, bool real) {
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0)
    stop("a copy to an address not a multiple of its bytes");
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0)
    stop("a copy from one not a multiple of its bytes");
  const Copy copy{to, from, bytes, real};
  if (options().order == Order::descending) finish_copies({copy});
  current->copies.push_back(copy);
}

void commit_copies() { current->groups.push_back(std::exchange(current->copies, {})); }

// Copies land as late as they may; in descending order they have landed at once, as they may, too.
void wait_copies(int youngest) {
  while (static_cast<int>(current->groups.size()) > youngest) {
    if (options().order == Order::ascending) finish_copies(current->groups.front());
    current->groups.pop_front();
  }
}

void wait_for_previous_kernel() { current->has_waited = true; }

void run_grid(Index3 grid, Index3 block, std::size_t shared_bytes, bool overlaps,
              const std::function<void()>& kernel) {
  if (options().good_launches == 0) device_is_lost = true;
  if (device_is_lost) return;
  --options().good_launches;
  const int n_threads = static_cast<int>(block.x);
  for (int i = static_cast<int>(fibers.size()); i < n_threads; ++i) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = std::make_unique<std::uint8_t[]>(kStackBytes);
    fibers.back()->index = {static_cast<unsigned>(i), 0, 0};
  }
  warps.resize((fibers.size() + kLanes - 1) / kLanes);
  shared = std::make_unique<GuardedPages>(shared_bytes, 128);
  body = &kernel;
  grid_size = grid;
  block_size = block;
  must_wait = overlaps;
  ++launches;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block(n_threads);
      }
    }
  }
}

cudaError_t allocate(void** data, std::size_t bytes) {
  ++memory_calls;
  if (device_is_lost) return cudaErrorIllegalAddress;
  if (memory_in_use + bytes > options().memory_bytes) return cudaErrorMemoryAllocation;
  memory_in_use += bytes;
  allocations.push_back(std::make_unique<GuardedPages>(bytes, 16));
  *data = allocations.back()->data();
  return cudaSuccess;
}

cudaError_t release(void* data) {
  ++memory_calls;
  for (auto it = allocations.begin(); it != allocations.end(); ++it) {
    if ((*it)->data() != data) continue;
    memory_in_use -= (*it)->size();
    allocations.erase(it);
    return cudaSuccess;
  }
  stop("memory is freed that is not allocated");
}

bool may_launch(std::size_t shared_bytes, std::size_t allowed) {
  return shared_bytes <= (allowed > 0 ? allowed : 48 << 10) &&
         shared_bytes <= options().block_shared_bytes;
}

}  // namespace emulation
