// Threads that stay awake through a forward: an operation is handed out and ended by a few atomics,
// which costs microseconds where a fork would cost tens.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/at_fork.h"

namespace sbd::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);  // the caller of run() is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(shares_.size()); }

  // Where the consecutive tasks begin that are a thread's own; thread size(): n_tasks.
  int first_task(int thread, int n_tasks) const {
    return static_cast<int>(std::int64_t{n_tasks} * thread / size());
  }

  // Calls fn(task, thread) for every task in [0, n_tasks), thread in [0, size()), and returns when
  // all have ended. Every thread has a share of consecutive tasks, which it takes one at a time, so
  // that what a task prefetches for its successor is used by the same core; a thread that is done
  // takes from the others' shares, so one that the system has put aside delays only the task it
  // holds. fn must not throw.
  template <typename Fn>
  void run(int n_tasks, Fn&& fn) {
    if (n_tasks == 1 || size() == 1) {
      for (int task = 0; task < n_tasks; ++task) fn(task, 0);
      return;
    }
    if (workers_.empty()) start_workers();  // a forked child has none
    using Body = std::remove_reference_t<Fn>;
    start({[](const void* body, int task, int thread) {
             (*static_cast<Body*>(const_cast<void*>(body)))(task, thread);
           },
           &fn, n_tasks});
  }

 private:
  struct Job {
    void (*call)(const void* body, int task, int thread);
    const void* body;
    int n_tasks;
  };
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  void start_workers();
  void stop();
  void forget_workers();
  void start(const Job& job);
  void work(int thread);
  void worker_loop(int thread, std::uint32_t seen);

  Job job_{};
  std::vector<Share> shares_;                        // one a thread
  alignas(64) std::atomic<std::uint32_t> epoch_{0};  // grows by one with every job
  alignas(64) std::atomic<bool> open_{false};        // workers may enter the job
  alignas(64) std::atomic<int> inside_{0};           // workers that may be touching it
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
  AtFork at_fork_;
};

}  // namespace sbd::cpu
