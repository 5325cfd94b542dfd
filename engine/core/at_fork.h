// What a fork of the process means to an object with threads or locks: a child has only the thread
// that forked.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "core/error.h"

namespace sbd {

// Three things to do around every fork, while this lives. As the last member of its object it ends
// before what they touch.
class AtFork {
 public:
  using Action = std::function<void()>;

  AtFork(Action before, Action in_parent, Action in_child)
      : before_(std::move(before)),
        in_parent_(std::move(in_parent)),
        in_child_(std::move(in_child)) {
    Members& all = members();
    const std::lock_guard lock(all.mutex);
    all.list.push_back(this);
  }
  ~AtFork() {
    Members& all = members();
    const std::lock_guard lock(all.mutex);
    std::erase(all.list, this);
  }
  AtFork(const AtFork&) = delete;
  AtFork& operator=(const AtFork&) = delete;

 private:
  struct Members {
    std::mutex mutex;  // held through a fork
    std::vector<AtFork*> list;
  };

  static Members& members() {
    static Members& all = *[] {
      const int error = pthread_atfork(
          [] {
            members().mutex.lock();
            for (const AtFork* member : members().list) member->before_();
          },
          [] {
            for (const AtFork* member : members().list) member->in_parent_();
            members().mutex.unlock();
          },
          [] {
            for (const AtFork* member : members().list) member->in_child_();
            members().mutex.unlock();
          });
      if (error != 0) fail(ErrorKind::memory, "no memory to prepare for forks of the process");
      return new Members;  // for good: a process may fork while it ends
    }();
    return all;
  }

  Action before_;
  Action in_parent_;
  Action in_child_;
};

}  // namespace sbd
