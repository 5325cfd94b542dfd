// Mutations of model files that know where a file has its numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/random.h"
#include "gguf_builder.h"

namespace fuzz {

using sbd::test::bytes_of;
using Fields = std::vector<std::pair<std::size_t, std::size_t>>;  // offset, width of an integer

struct Seed {
  std::string image;
  bool complete = false;   // loads and generates
  std::string model = {};  // of a draft adapter: the file that it is for
  Fields fields = {};      // every count, length, type, value, shape and offset
  Fields values = {};      // the values of keys alone
};

// Case `index` is a pure function of the seed and the index.
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t index) : key_(sbd::combine(seed, index)) {}
  std::uint64_t bits() { return sbd::combine(key_, counter_++); }
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : bits() % bound; }

 private:
  std::uint64_t key_;
  std::uint64_t counter_ = 0;
};

// Walks a valid image and fills in its fields.
class FieldFinder {
 public:
  explicit FieldFinder(Seed& seed) : seed_(seed) {}

  void find() {
    integer(4);
    integer(4);
    const std::uint64_t tensors = integer(8);
    const std::uint64_t keys = integer(8);
    for (std::uint64_t i = 0; i < keys; ++i) {
      text();
      value(integer(4));
    }
    for (std::uint64_t i = 0; i < tensors; ++i) {
      text();
      const std::uint64_t rank = integer(4);
      for (std::uint64_t j = 0; j < rank; ++j) {
        integer(8);
      }
      integer(4);
      integer(8);
    }
  }

 private:
  std::uint64_t integer(std::size_t width) {
    std::uint64_t number = 0;
    if (width > sizeof number || at_ + width > seed_.image.size()) {
      throw std::runtime_error("a seed file is not a valid GGUF file");
    }
    std::memcpy(&number, seed_.image.data() + at_, width);
    seed_.fields.emplace_back(at_, width);
    at_ += width;
    return number;
  }
  void text() { at_ += integer(8); }
  void value(std::uint64_t type) {
    constexpr std::size_t kWidths[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == sbd::test::gguf_value::string) {
      text();
    } else if (type == sbd::test::gguf_value::array) {
      const std::uint64_t element = integer(4);
      const std::uint64_t length = integer(8);
      for (std::uint64_t i = 0; i < length; ++i) {
        value(element);
      }
    } else if (type < std::size(kWidths)) {
      integer(kWidths[type]);
      seed_.values.push_back(seed_.fields.back());
    }
  }

  Seed& seed_;
  std::size_t at_ = 0;
};

// A number near which readers fail: a boundary of some integer type, or of this image.
inline std::uint64_t boundary(Random& random, std::size_t image_size) {
  const std::uint64_t power = std::uint64_t{1} << random.below(64);
  const std::uint64_t choices[] = {0, power, 0 - power, image_size, image_size / 8, 14};
  const std::uint64_t chosen = choices[random.below(std::size(choices))];
  return random.below(2) == 0 ? chosen : chosen + random.below(5) - 2;
}

// A float that arithmetic fails on: NaN, infinity, huge, minute or zero, in the upper half's bits,
// so that it is one for BF16 and F32, and nearly always for F16 and a group's scale.
inline std::uint16_t special(Random& random) {
  constexpr std::uint16_t kBits[] = {0x7fc0, 0x7f80, 0x7f7f, 0x7bff, 0x7c00, 0x7e00, 0x0001, 0};
  return static_cast<std::uint16_t>(kBits[random.below(std::size(kBits))] | random.below(2) << 15);
}

inline void mutate(Random& random, const std::vector<Seed>& seeds, const Seed& seed,
                   std::string& image) {
  const std::size_t size = image.size();
  const std::size_t header = std::min(size, seed.fields.back().first + 8);
  // Mostly among the keys and descriptions: a tensor's data have no structure.
  const std::size_t at = random.below(random.below(8) == 0 ? size : header);
  const Fields& fields = random.below(2) == 0 ? seed.fields : seed.values;
  const auto [field, width] = fields[random.below(fields.size())];
  const bool field_is_there = field + width <= size;
  const std::size_t piece = random.below(std::min<std::size_t>(size - at, 1 + random.below(200)));
  switch (random.below(12)) {
    case 0: image[at] = static_cast<char>(image[at] ^ (1 << random.below(8))); break;
    case 1: image[at] = static_cast<char>(random.bits()); break;
    case 2:
      if (field_is_there) {
        image.replace(field, width, bytes_of(boundary(random, size)).substr(0, width));
      }
      break;
    case 3:  // a length, count or offset a little off
      if (field_is_there) {
        image[field] = static_cast<char>(image[field] + static_cast<int>(random.below(9)) - 4);
      }
      break;
    case 4:  // a type: of a value, an array or a tensor
      if (field_is_there && width == 4) {
        image.replace(field, 4, bytes_of(static_cast<std::uint32_t>(random.below(42))));
      }
      break;
    case 5: image.resize(random.below(4) == 0 ? random.below(size) : std::min(size, field)); break;
    case 6: {  // the end of another file
      const Seed& other = seeds[random.below(seeds.size())];
      const std::size_t from = other.fields[random.below(other.fields.size())].first;
      image.resize(std::min(size, field));
      image += other.image.substr(from);
      break;
    }
    case 7: image.insert(random.below(size), image.substr(at, piece)); break;
    case 8: image.erase(at, piece); break;
    case 9:  // one field's bytes in another
      if (field_is_there) {
        const std::size_t from = fields[random.below(fields.size())].first;
        if (from + width <= size) {
          image.replace(field, width, image.substr(from, width));
        }
      }
      break;
    case 10:  // a run of weights, or of a column's
    case 11:
      if (size > header + 2) {
        const std::string bits = bytes_of(special(random));
        std::size_t place = header + random.below(size - header - 1) / 2 * 2;
        const std::size_t stride = std::size_t{2} << random.below(3);
        for (std::size_t left = std::size_t{1} << random.below(9); left > 0; --left) {
          if (place + 2 <= size) image.replace(place, 2, bits);
          place += stride;
        }
      }
      break;
  }
}

}  // namespace fuzz
