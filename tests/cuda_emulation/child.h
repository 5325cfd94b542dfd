// What ends a process, or changes it for good, is tried in one of its own.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>

#include "check.h"

namespace sbd::test {

struct Ended {
  int status;
  bool killed() const { return WIFSIGNALED(status); }
  bool well() const { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }
};

// Runs the body, whose failed checks are the child's exit status; `said`: gets its standard error,
// which is otherwise the test's own.
template <typename Body>
Ended in_child(Body body, std::string* said = nullptr) {
  std::fflush(nullptr);
  std::FILE* file = said == nullptr ? nullptr : std::tmpfile();
  const pid_t child = fork();
  if (child == 0) {
    if (file != nullptr) dup2(fileno(file), STDERR_FILENO);
    failed_checks = 0;
    try {
      body();
    } catch (const std::exception& error) {
      report("in a child", 0, error.what());
    }
    std::fflush(nullptr);
    _exit(failed_checks == 0 ? 0 : 1);
  }
  Ended ended{};
  waitpid(child, &ended.status, 0);
  if (file != nullptr) {
    std::rewind(file);
    char line[1000];
    while (std::fgets(line, sizeof line, file) != nullptr) *said += line;
    std::fclose(file);
  }
  return ended;
}

}  // namespace sbd::test
