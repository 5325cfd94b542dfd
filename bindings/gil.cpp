#include "gil.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "core/at_fork.h"

namespace py = pybind11;

namespace sbd {
namespace {

std::atomic<std::thread::id> ending{};  // the thread that ends Python, once one does
std::atomic<int> entering{0};

// Whoever is on the way in still comes in.
void end() {
  ending = std::this_thread::get_id();
  const py::gil_scoped_release released;
  while (entering > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

Entry::Entry() {
  ++entering;
  const std::thread::id thread = ending;
  may_enter_ = thread == std::thread::id() || thread == std::this_thread::get_id();
  if (!may_enter_) --entering;
}

Entry::~Entry() {
  if (may_enter_) --entering;
}

Release::~Release() {
  const Entry entry;
  while (!entry.may_enter()) std::this_thread::sleep_for(std::chrono::hours(1));
  PyEval_RestoreThread(state_);
}

void watch_for_the_end_of_python() {
  py::module_::import("atexit").attr("register")(py::cpp_function(&end));
  static const AtFork at_fork([] {}, [] {}, [] { entering = 0; });
}

}  // namespace sbd
