// Every task runs exactly once, whatever the number of threads and cores.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "backend/cpu/thread_pool.h"
#include "check.h"

namespace sbd::cpu {
namespace {

TEST(thread_pool_runs_every_task_once) {
  for (const int n_threads : {1, 2, 3, 8, 33}) {  // more than there are cores, too
    ThreadPool pool(n_threads);
    CHECK_EQ(pool.size(), n_threads);
    for (const int n_tasks : {0, 1, 2, 7, 33, 1000}) {
      std::vector<std::atomic<int>> counts(static_cast<std::size_t>(n_tasks));
      std::atomic<int> strange_threads{0};
      pool.run(n_tasks, [&](int task, int thread) {
        ++counts[static_cast<std::size_t>(task)];
        if (thread < 0 || thread >= n_threads) ++strange_threads;
      });
      for (const auto& count : counts) CHECK_EQ(count.load(), 1);
      CHECK_EQ(strange_threads.load(), 0);
    }
  }
}

// Nothing of a job is touched after run() has returned: each has its own memory, and the sum of
// what was written is read at once.
TEST(thread_pool_many_short_runs) {
  for (const int n_threads : {2, 3}) {
    ThreadPool pool(n_threads);
    long long total = 0;
    constexpr int runs = 50000;
    for (int run = 0; run < runs; ++run) {
      int results[5] = {};
      const int n_tasks = 2 + run % 4;
      pool.run(n_tasks, [&](int task, int) { results[task] = run + task; });
      for (int task = 0; task < 5; ++task) {
        total += results[task] == (task < n_tasks ? run + task : 0);
      }
    }
    CHECK_EQ(total, 5 * runs);
  }
}

// A thread index is used by one thread at a time: per-thread scratch needs no lock.
TEST(thread_pool_thread_indices_are_exclusive) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> users(4);
  std::atomic<int> clashes{0};
  for (int run = 0; run < 500; ++run) {
    pool.run(20, [&](int, int thread) {
      auto& user = users[static_cast<std::size_t>(thread)];
      if (user++ != 0) ++clashes;
      std::this_thread::yield();
      --user;
    });
  }
  CHECK_EQ(clashes.load(), 0);
}

TEST(thread_pool_wakes_up_and_ends) {
  for (int i = 0; i < 50; ++i) const ThreadPool never_used(3);
  ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the workers have gone to sleep
    std::atomic<int> sum{0};
    pool.run(10, [&](int task, int) { sum += task; });
    CHECK_EQ(sum.load(), 45);
  }
}  // and end here, asleep or not

}  // namespace
}  // namespace sbd::cpu
