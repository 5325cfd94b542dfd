// Walks a GGUF image from its start; nothing is read past its end, or before it is filled.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ostream>
#include <span>
#include <string_view>

#include "core/error.h"
#include "format/gguf.h"
#include "format/text.h"

namespace sbd {

inline constexpr std::string_view kAgain = "the file is damaged: download or convert it again";

// What is being read, for errors.
struct Place {
  std::string_view kind;
  std::string_view name = {};
};

inline std::ostream& operator<<(std::ostream& out, const Place& place) {
  out << place.kind;
  return place.name.empty() ? out : out << " " << quote(place.name);
}

class Cursor {
 public:
  Cursor(std::span<const std::byte> image, std::string_view source, const FillImage& fill)
      : image_(image), source_(source), fill_(fill) {}

  std::uint64_t at() const { return at_; }
  std::uint64_t remaining() const { return image_.size() - at_; }

  // What comes next, up to so many bytes.
  std::string_view peek(std::uint64_t size) const {
    size = std::min(size, remaining());
    fill_(at_ + size);
    return {reinterpret_cast<const char*>(image_.data()) + at_, size};
  }

  template <typename T>
  T read(const Place& place) {
    T value;
    std::memcpy(&value, take(sizeof value, place), sizeof value);
    return value;
  }

  std::string_view read_string(const Place& place) {
    const std::uint64_t start = at_;
    const auto length = read<std::uint64_t>(place);
    SBD_CHECK(length <= remaining(), "{}: {}: a string of {} bytes at byte {}, but {} are left; {}",
              source_, place, length, start, remaining(), kAgain);
    const std::string_view text(take(length, place), length);
    SBD_CHECK(is_utf8(text), "{}: {}: the string {} at byte {} is not UTF-8; {}", source_, place,
              quote(text), start, kAgain);
    return text;
  }

  // A count claimed here fits in what is left of the file.
  void check_count(const Place& place, std::string_view things, std::uint64_t count,
                   std::uint64_t smallest) const {
    SBD_CHECK(count <= remaining() / smallest,
              "{}: {}: {} {} of at least {} bytes each, but {} bytes are left; {}", source_, place,
              count, things, smallest, remaining(), kAgain);
  }

 private:
  const char* take(std::uint64_t size, const Place& place) {
    SBD_CHECK(size <= remaining(), "{}: {}: wants {} bytes at byte {}, but the file ends at {}; {}",
              source_, place, size, at_, image_.size(), kAgain);
    const char* start = peek(size).data();
    at_ += size;
    return start;
  }

  std::span<const std::byte> image_;
  std::string_view source_;
  const FillImage& fill_;
  std::uint64_t at_ = 0;
};

}  // namespace sbd
