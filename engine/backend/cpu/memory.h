// Zeroed pages straight from the operating system: reserved at once, touched lazily.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace sbd::cpu {

class Pages {
 public:
  Pages() = default;
  // huge: ask for huge pages, for memory that will be touched from end to end.
  Pages(std::size_t n_bytes, bool huge);
  ~Pages();
  Pages(Pages&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace sbd::cpu
