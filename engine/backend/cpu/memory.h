// Zeroed pages straight from the operating system: reserved at once, touched lazily.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace sbd::cpu {

// Bytes that this process could still take: the system's, or a container's where that is less.
std::size_t available_memory();

class Pages {
 public:
  Pages() = default;
  // huge: ask for huge pages, for memory that will be touched from end to end, and begin on one.
  Pages(std::size_t n_bytes, bool huge);
  ~Pages();
  Pages(Pages&& other) noexcept { *this = std::move(other); }
  Pages& operator=(Pages&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

// Pieces of zeroed memory on huge pages, small ones one behind the other: a weight alone would
// begin and end amid such pages, and a small one would have none. A chunk lives as long as a piece
// of it.
class Arena {
 public:
  std::shared_ptr<std::uint8_t> allocate(std::size_t n_bytes);

 private:
  std::shared_ptr<Pages> chunk_;
  std::size_t used_ = 0;
};

}  // namespace sbd::cpu
