// Mutation fuzzer of the model file reader:
//   fuzz_gguf [--iterations N] [--seed S] [--only I] [FILE...]
//
// Every case is a valid image (built in, and the given files, best below 64 KiB) with a few
// mutations, read whole: keys, configuration, every byte of every tensor. It must end in success or
// in an sbd::Error of one line, within a second and within the memory that the image's size
// justifies. --only repeats a single case. Meant to be built with AddressSanitizer and UBSan.
#include <malloc.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/random.h"
#include "format/gguf.h"
#include "format/model_config.h"
#include "gguf_builder.h"

// Live and highest number of bytes from operator new; past the limit an allocation fails.
namespace memory {
std::size_t live = 0;
std::size_t peak = 0;
std::size_t limit = SIZE_MAX;
}  // namespace memory

void* operator new(std::size_t size) {
  if (size > memory::limit || memory::live > memory::limit - size) {
    throw std::bad_alloc();
  }
  void* block = std::malloc(size);
  if (block == nullptr) {
    throw std::bad_alloc();
  }
  memory::live += malloc_usable_size(block);
  memory::peak = std::max(memory::peak, memory::live);
  return block;
}
void operator delete(void* block) noexcept {
  memory::live -= malloc_usable_size(block);
  std::free(block);
}
void operator delete(void* block, std::size_t) noexcept { operator delete(block); }

namespace {

using sbd::test::bytes_of;
using Fields = std::vector<std::pair<std::size_t, std::size_t>>;  // offset, width of an integer

struct Seed {
  std::string image;
  Fields fields;
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

// Where a valid image has its counts, lengths, types, values, shapes and offsets.
class FieldFinder {
 public:
  explicit FieldFinder(const std::string& image) : image_(image) {}

  Fields find() {
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
    return fields_;
  }

 private:
  std::uint64_t integer(std::size_t width) {
    std::uint64_t number = 0;
    if (width > sizeof number || at_ + width > image_.size()) {
      throw std::runtime_error("a seed file is not a valid GGUF file");
    }
    std::memcpy(&number, image_.data() + at_, width);
    fields_.emplace_back(at_, width);
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
    }
  }

  const std::string& image_;
  std::size_t at_ = 0;
  Fields fields_;
};

// A number near which readers fail: a boundary of some integer type, or of this image.
std::uint64_t boundary(Random& random, std::size_t image_size) {
  const std::uint64_t power = std::uint64_t{1} << random.below(64);
  const std::uint64_t choices[] = {0, power, 0 - power, image_size, image_size / 8, 14};
  const std::uint64_t chosen = choices[random.below(std::size(choices))];
  return random.below(2) == 0 ? chosen : chosen + random.below(5) - 2;
}

void mutate(Random& random, const std::vector<Seed>& seeds, const Seed& seed, std::string& image) {
  const std::size_t size = image.size();
  const std::size_t header = std::min(size, seed.fields.back().first + 8);
  // Mostly among the keys and descriptions: a tensor's data have no structure.
  const std::size_t at = random.below(random.below(8) == 0 ? size : header);
  const auto [field, width] = seed.fields[random.below(seed.fields.size())];
  const bool field_is_there = field + width <= size;
  const std::size_t piece = random.below(std::min<std::size_t>(size - at, 1 + random.below(200)));
  switch (random.below(10)) {
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
        const std::size_t from = seed.fields[random.below(seed.fields.size())].first;
        if (from + width <= size) {
          image.replace(field, width, image.substr(from, width));
        }
      }
      break;
  }
}

// The image with everything read from it; returns its error, or nothing.
std::string read_all(const std::string& image) {
  try {
    const auto contents = sbd::parse_gguf(std::as_bytes(std::span(image)), "fuzz");
    unsigned sum = 0;
    for (const sbd::Tensor& tensor : contents.tensors) {
      double values = 1;  // in floating point, so that no product wraps around
      for (const std::int64_t dimension : tensor.shape) {
        values *= static_cast<double>(dimension);
      }
      const double blocks = values / sbd::values_per_block(tensor.dtype);
      if (blocks * static_cast<double>(sbd::bytes_per_block(tensor.dtype)) !=
          static_cast<double>(tensor.data.size())) {
        throw std::logic_error("a tensor's data do not have its shape's size");
      }
      for (const std::byte byte : tensor.data) {
        sum += static_cast<unsigned>(byte);
      }
    }
    volatile unsigned sink = sum;
    static_cast<void>(sink);
    const auto config = sbd::read_model_config(contents.metadata);
    sbd::read_decode_defaults(contents.metadata, config);
  } catch (const sbd::Error& error) {
    return error.what();
  }
  return {};
}

// An error's kind: its line without names and numbers.
std::string outline(const std::string& message) {
  std::string out;
  bool name = false;
  for (const char c : message) {
    name ^= c == '\'';
    if (!name && c != '\'' && (c < '0' || c > '9')) {
      out += c;
    }
  }
  return out;
}

std::uint64_t current_case = 0;

void report_case() {
  std::fprintf(stderr, "in case %llu (repeat with --only)\n",
               static_cast<unsigned long long>(current_case));
}

void on_alarm(int) {
  report_case();
  std::fprintf(stderr, "no end within 10 s\n");
  std::_Exit(1);
}

std::vector<Seed> built_in_seeds() {
  std::vector<Seed> seeds;
  for (const char* architecture : {"llama", "qwen2", "qwen3"}) {
    seeds.push_back({sbd::test::tiny_model(architecture).build(), {}});
  }
  sbd::test::GgufBuilder foreign = sbd::test::tiny_model();  // no sbd.* keys: looser rules
  std::erase_if(foreign.key_values,
                [](const std::string& entry) { return entry.find("sbd.") != std::string::npos; });
  seeds.push_back({foreign.build(), {}});
  sbd::test::GgufBuilder dense = sbd::test::tiny_model();  // most memory for its bytes
  dense.array("bytes", sbd::test::gguf_value::u8, 4000, std::string(4000, '\1'));
  for (int i = 0; i < 100; ++i) {
    dense.key(std::to_string(i), sbd::test::gguf_value::boolean, "\1");
    dense.tensor({std::to_string(i), {1}, sbd::test::gguf_tensor::f32, "data"});
  }
  seeds.push_back({dense.build(), {}});
  return seeds;
}

struct Arguments {
  std::uint64_t iterations = 100000;
  std::uint64_t seed = 1;
  std::uint64_t first = 0;
  std::vector<Seed> seeds = built_in_seeds();
};

Arguments read_arguments(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto number = [&]() -> std::uint64_t {
      if (i + 1 == argc) {
        throw std::runtime_error(argument + " wants a number");
      }
      return std::stoull(argv[++i]);
    };
    if (argument == "--iterations") {
      arguments.iterations = number();
    } else if (argument == "--seed") {
      arguments.seed = number();
    } else if (argument == "--only") {
      arguments.first = number();
      arguments.iterations = 1;
    } else {
      std::ifstream file(argument, std::ios::binary);
      if (!file) {
        throw std::runtime_error("cannot read " + argument);
      }
      arguments.seeds.push_back({std::string(std::istreambuf_iterator<char>(file), {}), {}});
    }
  }
  for (Seed& seed : arguments.seeds) {
    seed.fields = FieldFinder(seed.image).find();
    if (const std::string error = read_all(seed.image); !error.empty()) {
      throw std::runtime_error("a seed is not valid: " + error);
    }
  }
  return arguments;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_on_error() { report_case(); }
#endif

int main(int argc, char** argv) {
  const Arguments arguments = read_arguments(argc, argv);
  const std::vector<Seed>& seeds = arguments.seeds;
  ::signal(SIGALRM, on_alarm);

  std::uint64_t successes = 0;
  std::uint64_t failures = 0;
  double slowest = 0;
  std::size_t largest = 0;
  std::set<std::string> outlines;
  for (std::uint64_t i = 0; i < arguments.iterations; ++i) {
    current_case = arguments.first + i;
    Random random(arguments.seed, current_case);
    const Seed& seed = seeds[random.below(seeds.size())];
    std::string mutated = seed.image;
    for (std::size_t left = 1 + random.below(1 + random.below(4)); left > 0 && !mutated.empty();
         --left) {
      mutate(random, seeds, seed, mutated);
    }
    mutated.shrink_to_fit();  // so that a byte past the end is one past the allocation

    // Keys, arrays and descriptions in memory take up to eight times their bytes in the file (an
    // array of bytes becomes one of 64 bits, a key of 16 bytes a node of 112); an error's line and
    // stream, 16 KiB.
    const std::size_t before = memory::live;
    memory::limit = before + 8 * mutated.size() + (16 << 10);
    memory::peak = before;
    ::alarm(10);
    const auto start = std::chrono::steady_clock::now();
    std::string problem;
    std::string error;
    try {
      error = read_all(mutated);
    } catch (const std::exception& other) {
      problem = other.what();
    }
    memory::limit = SIZE_MAX;
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    ::alarm(0);
    if (error.find('\n') != std::string::npos) {
      problem = "an error of several lines: " + error;
    }
    if (seconds > 1) {
      problem = "slow: " + std::to_string(seconds) + " s";
    }
    if (!problem.empty()) {
      ++failures;
      report_case();
      std::fprintf(stderr, "%s (%zu bytes)\n", problem.c_str(), mutated.size());
    }
    successes += error.empty() && problem.empty();
    slowest = std::max(slowest, seconds);
    largest = std::max(largest, memory::peak - before);
    outlines.insert(outline(error));
  }
  std::printf(
      "%llu cases: %llu read, %llu refused with %zu kinds of line, %llu failed; slowest %.1f ms, "
      "most memory %zu KiB\n",
      static_cast<unsigned long long>(arguments.iterations),
      static_cast<unsigned long long>(successes),
      static_cast<unsigned long long>(arguments.iterations - successes - failures), outlines.size(),
      static_cast<unsigned long long>(failures), slowest * 1e3, largest >> 10);
  return failures == 0 ? 0 : 1;
}
