// Wakes an event loop, which waits for descriptors.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "core/error.h"

namespace sbd {

// A descriptor to wait for: readable from ring() on until hush(). Neither takes memory or waits; it
// is for its owner to let no two threads do it at once.
class Bell {
 public:
  Bell() {
    if (::pipe(ends_.data()) != 0) {
      fail(ErrorKind::memory, "no pipe to wake an event loop with ({})", std::strerror(errno));
    }
    for (const int end : ends_) {
      ::fcntl(end, F_SETFD, FD_CLOEXEC);
      ::fcntl(end, F_SETFL, O_NONBLOCK);
    }
  }
  ~Bell() {
    for (const int end : ends_) ::close(end);
  }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;

  int descriptor() const { return ends_[0]; }

  // Where the pipe is full, it has been rung.
  void ring() {
    const char sound = 0;
    if (!rung_) rung_ = ::write(ends_[1], &sound, 1) == 1 || errno == EAGAIN;
  }

  // Whoever shares the pipe, as a forked child does, may have rung it as well.
  void hush() {
    std::array<char, 64> sounds;
    while (::read(ends_[0], sounds.data(), sounds.size()) == std::ssize(sounds)) {
    }
    rung_ = false;
  }

 private:
  std::array<int, 2> ends_{};
  bool rung_ = false;
};

}  // namespace sbd
