// Counts the program's memory by replacing operator new and mmap: include it in one unit.
#pragma once

#include <malloc.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace memory {

struct Meter {
  std::size_t live = 0;
  std::size_t peak = 0;
  void add(std::size_t size) { peak = std::max(peak, live += size); }
  void subtract(std::size_t size) { live -= size; }
};

inline Meter heap;                    // operator new
inline Meter mapped;                  // mmap: the model file, packed weights, the KV cache
inline std::size_t limit = SIZE_MAX;  // of the heap; past it an allocation fails

inline void* allocate(std::size_t size, std::size_t alignment) {
  const bool fits = size <= limit && heap.live <= limit - size;
  void* block = nullptr;
  if (!fits || ::posix_memalign(&block, alignment, size) != 0) {
    throw std::bad_alloc();
  }
  heap.add(malloc_usable_size(block));
  return block;
}

inline void release(void* block) {
  heap.subtract(malloc_usable_size(block));
  std::free(block);
}

}  // namespace memory

void* operator new(std::size_t size) { return memory::allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return memory::allocate(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return operator new(size);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* block) noexcept { memory::release(block); }
void operator delete(void* block, std::size_t) noexcept { memory::release(block); }
void operator delete(void* block, std::align_val_t) noexcept { memory::release(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept {
  memory::release(block);
}

extern "C" void* mmap(void* address, std::size_t size, int protection, int flags, int fd,
                      off_t offset) noexcept {
  const long result = ::syscall(SYS_mmap, address, size, protection, flags, fd, offset);
  if (result == -1) return MAP_FAILED;
  memory::mapped.add(size);
  return reinterpret_cast<void*>(result);
}

extern "C" int munmap(void* address, std::size_t size) noexcept {
  memory::mapped.subtract(size);
  return static_cast<int>(::syscall(SYS_munmap, address, size));
}
