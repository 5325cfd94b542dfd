// The instruction sets, best first, and which of them this CPU runs.
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <string>

#include "backend/cpu/kernels.h"
#include "core/error.h"

namespace sbd::cpu {

namespace {

struct Entry {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
bool has_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }  // with dot products
#endif

constexpr Entry kTable[] = {
#if defined(__x86_64__)
    {&avx512_bf16::kernels, has_avx512_bf16}, {&avx512::kernels, has_avx512},
    {&avx2_vnni::kernels, has_avx2_vnni},     {&avx2::kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon::kernels, has_neon},
#endif
    {&scalar::kernels, [] { return true; }},
};

}  // namespace

const Kernels& select_kernels() {
  const char* wanted = std::getenv("SBD_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Entry& entry : kTable) {
      if (entry.supported()) return *entry.kernels;
    }
  }
  std::string known;
  for (const Entry& entry : kTable) {
    if (std::string(entry.kernels->name) == wanted) {
      SBD_CHECK(entry.supported(), "SBD_ISA={}: this CPU does not support it", wanted);
      return *entry.kernels;
    }
    known += known.empty() ? "" : ", ";
    known += entry.kernels->name;
  }
  fail(ErrorKind::value, "SBD_ISA={}: unknown instruction set, expected one of {}", wanted, known);
}

const Kernels* supported_kernels(int i) {
  for (const Entry& entry : kTable) {
    if (entry.supported() && i-- == 0) return entry.kernels;
  }
  return nullptr;
}

}  // namespace sbd::cpu
