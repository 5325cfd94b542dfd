#include "backend/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

#include "core/bytes.h"
#include "core/error.h"

namespace sbd::cpu {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = std::size_t{64} << 20;

// The first number behind `key` in a file of the system's; nothing where it has none.
std::optional<std::size_t> number_in(const char* path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const std::size_t digits = line.find_first_of("0123456789", key.size());
    std::size_t number = 0;
    if (digits == std::string::npos) return std::nullopt;  // "max"
    const auto [end, error] =
        std::from_chars(line.data() + digits, line.data() + line.size(), number);
    if (error == std::errc()) return number;
  }
  return std::nullopt;
}

}  // namespace

std::size_t available_memory() {
  auto bytes = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
               static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (const auto kilobytes = number_in("/proc/meminfo", "MemAvailable:")) bytes = *kilobytes << 10;
  const auto limit = number_in("/sys/fs/cgroup/memory.max", "");
  auto used = number_in("/sys/fs/cgroup/memory.current", "");
  if (limit && used) {
    // Pages of files count as used there, and give way.
    for (const char* key : {"inactive_file ", "active_file "}) {
      *used -= std::min(*used, number_in("/sys/fs/cgroup/memory.stat", key).value_or(0));
    }
    bytes = std::min(bytes, *limit - std::min(*limit, *used));
  }
  return bytes;
}

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
