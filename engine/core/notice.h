// One line for whoever runs the program, on standard error; the same line once per process.
#pragma once

#include <cstdio>
#include <mutex>
#include <set>
#include <string>

namespace sbd {

inline std::set<std::string>& notices_given() {
  static std::set<std::string> given;
  return given;
}

inline void notice(const std::string& line) {
  static std::mutex lock;
  const std::scoped_lock hold(lock);
  if (notices_given().insert(line).second) std::fprintf(stderr, "note: %s\n", line.c_str());
}

}  // namespace sbd
