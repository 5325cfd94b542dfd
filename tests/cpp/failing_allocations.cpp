#include "failing_allocations.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

std::atomic<long> left{-1};  // until one fails; below 0: none does
std::atomic<bool> all_behind = false;
std::atomic<bool> any_failed = false;

void* allocate(std::size_t size, std::size_t alignment) {
  if (left.load(std::memory_order_relaxed) >= 0 && left-- == 0) {
    left = all_behind ? 0 : -1;
    any_failed = true;
    throw std::bad_alloc();
  }
  void* block = nullptr;
  if (posix_memalign(&block, alignment, size) != 0) throw std::bad_alloc();
  return block;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return operator new(size);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t) noexcept { std::free(block); }
void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }

namespace sbd::test {

FailingAllocations::FailingAllocations(long until, bool persistent) {
  any_failed = false;
  all_behind = persistent;
  left = until;
}

FailingAllocations::~FailingAllocations() { left = -1; }

bool FailingAllocations::failed() const { return any_failed; }

}  // namespace sbd::test
