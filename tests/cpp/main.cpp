// sbd_tests [NAME] [K/N]: runs the tests whose name contains NAME; of these the Kth of N parts.
// With SBD_LEAVE_KERNELS set, without those that try every instruction set by themselves. Exit code
// 1 on a failure or where nothing matches, 2 where the CPU lacks what SBD_ISA names. What takes
// longer than a second is told.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>

#include "backend/cpu/kernels.h"
#include "check.h"

// ThreadSanitizer asks for it. The last owner of an exception frees it, whoever read it before:
// what orders them is the count of its owners, inside libstdc++, which is not instrumented.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n";
}

int main(int argc, char** argv) {
  try {
    sbd::cpu::select_kernels();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  int part = 0;
  int parts = 1;
  if (argc > 1 && std::sscanf(argv[argc - 1], "%d/%d", &part, &parts) == 2) {
    --argc;
  }
  const std::string_view filter = argc > 1 ? argv[1] : "";
  const bool leaves_kernels = std::getenv("SBD_LEAVE_KERNELS") != nullptr;
  int matching = 0;
  int run = 0;
  int failed = 0;
  for (const auto& test : sbd::test::tests()) {
    if (std::string_view(test.name).find(filter) == std::string_view::npos) {
      continue;
    }
    if (leaves_kernels && test.on_every_isa) continue;
    if (parts < 1 || matching++ % parts != part % parts) continue;
    ++run;
    const int before = sbd::test::failed_checks;
    sbd::test::asked_for_every_isa = false;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& error) {
      sbd::test::report(test.name, 0, std::string("unexpected exception: ") + error.what());
    }
    if (sbd::test::asked_for_every_isa != test.on_every_isa) {
      sbd::test::report(test.name, 0, "TEST_ON_EVERY_ISA is what asks for tested_kernels()");
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (took.count() > 1) {
      std::printf("%.1f s %s\n", took.count(), test.name);
    }
    if (sbd::test::failed_checks != before) {
      ++failed;
      std::fprintf(stderr, "FAILED %s\n", test.name);
    }
  }
  std::printf("%d tests, %d failed\n", run, failed);
  if (run == 0) {
    std::fprintf(stderr, "no test's name contains '%s'\n", argc > 1 ? argv[1] : "");
  }
  return run == 0 || failed > 0 ? 1 : 0;
}
