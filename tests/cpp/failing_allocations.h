// Memory that runs out where a test wants it: operator new of the whole program, which fails when
// it is told to.
#pragma once

namespace sbd::test {

// From now on: allocations, of all threads, until one fails, and with `persistent` all behind it.
// Until the end of this no other is told so.
class FailingAllocations {
 public:
  FailingAllocations(long until, bool persistent);
  ~FailingAllocations();
  FailingAllocations(const FailingAllocations&) = delete;
  FailingAllocations& operator=(const FailingAllocations&) = delete;

  bool failed() const;  // it came so far
};

}  // namespace sbd::test
