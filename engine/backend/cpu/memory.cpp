#include "backend/cpu/memory.h"

#include <sys/mman.h>

#include "core/error.h"

namespace sbd::cpu {

Pages::Pages(std::size_t n_bytes, bool huge) : size_(n_bytes) {
  if (n_bytes == 0) return;
  void* p = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    size_ = 0;
    fail(ErrorKind::memory, "cannot reserve {} MiB of memory: use a smaller model or n_ctx",
         n_bytes >> 20);
  }
  data_ = static_cast<std::uint8_t*>(p);
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(p, n_bytes, MADV_HUGEPAGE);  // a wish; without it only speed is lost
#else
  static_cast<void>(huge);
#endif
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace sbd::cpu
