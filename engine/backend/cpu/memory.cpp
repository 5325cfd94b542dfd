#include "backend/cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>

#include "core/bytes.h"
#include "core/error.h"

namespace sbd::cpu {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = std::size_t{64} << 20;

}  // namespace

Pages::Pages(std::size_t n_bytes, bool huge) : size_(n_bytes) {
  if (n_bytes == 0) return;
  mapped_ = huge ? n_bytes + kHugePage : n_bytes;  // what is not touched costs nothing
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    fail(ErrorKind::memory, "cannot reserve {} MiB of memory: use a smaller model or `n_ctx`",
         n_bytes >> 20);
  }
  mapping_ = static_cast<std::uint8_t*>(p);
  data_ = mapping_;
  if (huge) {
    data_ += -reinterpret_cast<std::uintptr_t>(p) % kHugePage;
#if defined(MADV_HUGEPAGE)
    madvise(data_, n_bytes, MADV_HUGEPAGE);  // a wish; without it only speed is lost
#endif
  }
}

Pages::~Pages() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

std::shared_ptr<std::uint8_t> Arena::allocate(std::size_t n_bytes) {
  n_bytes = round_up(n_bytes, 64);
  if (!chunk_ || used_ + n_bytes > chunk_->size()) {
    chunk_ = std::make_shared<Pages>(std::max(round_up(n_bytes, kHugePage), kChunk), /*huge=*/true);
    used_ = 0;
  }
  std::uint8_t* piece = chunk_->data() + used_;
  used_ += n_bytes;
  return {chunk_, piece};
}

}  // namespace sbd::cpu
