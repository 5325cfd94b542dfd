#include "backend/cpu/thread_pool.h"

#include <system_error>

#include "core/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sbd::cpu {

namespace {

// A pause is about 20 nanoseconds. Waits inside a forward are mostly shorter than kPatience of
// them; after that the core is offered to other threads now and then, as there may be fewer cores
// than threads. Offering it at once would hand it to another program in the middle of a forward.
// After kSpins a worker sleeps: the forward is over.
constexpr int kPatience = 2000;
constexpr int kSpins = 5000;

void pause(int spin) {
  if (spin > kPatience && spin % 64 == 0) {
    std::this_thread::yield();
  } else {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // many cores take a yield for nothing
#endif
  }
}

}  // namespace

ThreadPool::ThreadPool(int n_threads)
    : shares_(static_cast<std::size_t>(n_threads)),
      at_fork_([] {}, [] {}, [this] { forget_workers(); }) {
  start_workers();
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start_workers() {
  try {
    for (int thread = 1; thread < size(); ++thread) {
      workers_.emplace_back(&ThreadPool::worker_loop, this, thread, epoch_.load());
    }
  } catch (const std::system_error& error) {
    const std::size_t started = workers_.size() + 1;
    stop();
    fail(ErrorKind::memory, "only {} of {} threads could be started ({}): ask for fewer", started,
         size(), error.what());
  }
}

void ThreadPool::stop() {
  stopping_ = true;
  ++epoch_;
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stopping_ = false;
}

// In a forked child: they are the parent's, and a handle to one can be neither joined nor
// destroyed. The next job starts others.
void ThreadPool::forget_workers() {
  new std::vector<std::thread>(std::move(workers_));
  workers_.clear();
  open_ = false;
  inside_ = 0;
}

// A worker enters (inside_ + 1) before it looks whether the job is open, and the caller closes the
// job before it looks whether anyone is inside. All are sequentially consistent, so one of the two
// sees the other: nobody touches a job after run() has returned.
void ThreadPool::start(const Job& job) {
  job_ = job;
  for (int i = 0; i < size(); ++i) {
    shares_[i].next = first_task(i, job.n_tasks);
    shares_[i].end = first_task(i + 1, job.n_tasks);
  }
  open_ = true;
  ++epoch_;
  epoch_.notify_all();
  work(0);
  open_ = false;
  for (int spin = 0; inside_ != 0; spin = spin < kSpins ? spin + 1 : kPatience) pause(spin);
}

void ThreadPool::work(int thread) {
  const Job job = job_;
  const int n = static_cast<int>(shares_.size());
  for (int i = 0; i < n; ++i) {
    Share& share = shares_[(thread + i) % n];
    if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
    for (int task = share.next++; task < share.end; task = share.next++) {
      job.call(job.body, task, thread);
    }
  }
}

void ThreadPool::worker_loop(int thread, std::uint32_t seen) {
  while (true) {
    for (int spin = 0; spin < kSpins && epoch_ == seen; ++spin) pause(spin);
    epoch_.wait(seen);
    seen = epoch_;
    if (stopping_) return;
    ++inside_;
    if (open_) work(thread);
    --inside_;
  }
}

}  // namespace sbd::cpu
