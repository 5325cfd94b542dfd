// The ways out of Python's lock, the GIL, and back in. Python unwinds the stack of a thread that
// asks for the lock while Python ends, and destructors there would touch its objects without it. So
// from the moment that Python is about to end nobody comes in but the thread that ends it.
#pragma once

#include <pybind11/pybind11.h>

#include "core/error.h"

namespace sbd {

// Once, when the module is imported.
void watch_for_the_end_of_python();

// A thread's way in: Python does not end while one lives that may enter.
class Entry {
 public:
  Entry();
  ~Entry();
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;

  bool may_enter() const { return may_enter_; }

 private:
  bool may_enter_;
};

// Without the GIL while it lives. Where Python has begun to end meanwhile, its thread sleeps until
// the process is over.
class Release {
 public:
  Release() : state_(PyEval_SaveThread()) {}
  ~Release();
  Release(const Release&) = delete;
  Release& operator=(const Release&) = delete;

 private:
  PyThreadState* state_;
};

// What fn() returns or throws, called with the GIL.
template <typename Fn>
auto with_gil(Fn&& fn) {
  const Entry entry;
  SBD_CHECK(entry.may_enter(), "Python is about to end");
  const pybind11::gil_scoped_acquire gil;
  return fn();
}

// What fn() returns or throws, called without the GIL.
template <typename Fn>
auto without_gil(Fn&& fn) {
  const Release release;
  return fn();
}

}  // namespace sbd
