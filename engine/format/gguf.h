// GGUF reader (versions 2 and 3, little-endian). The file is trusted in nothing: every count,
// length, offset, type, shape and product is checked against the file's size before it is used or
// allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "format/metadata.h"

namespace sbd {

struct FileTensor {  // of any type
  std::string name;
  std::string type;            // GGUF's name of it, or the number of one that is not known
  std::optional<DType> dtype;  // nothing where the engine cannot run it
  std::vector<std::int64_t> shape;
  std::uint64_t offset;   // of its data in the file
  std::uint64_t n_bytes;  // of an unknown type: all up to the next tensor
};

struct GgufContents {
  Metadata metadata;
  std::vector<FileTensor> tensors;  // in file order; names are unique
  std::uint64_t data_begin;         // where the keys and descriptions end, padding included
};

// Names the types among these that the engine cannot run, and the first tensor that has one; ""
// where it can run all.
std::string why_types_cannot_run(const std::vector<FileTensor>& tensors);

// Called before the bytes of an image up to `end` are looked at: they must be there afterwards.
using FillImage = std::function<void(std::uint64_t end)>;

// Parses a file's image, of which it looks at keys and descriptions. `source` names the file in
// errors.
GgufContents parse_gguf(
    std::span<const std::byte> image, std::string_view source,
    const FillImage& fill = [](std::uint64_t) {});

// An open model file. It is read, not mapped: who cuts it short meanwhile gets an error, where a
// page that is gone would end the process.
class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);

  const Metadata& metadata() const { return contents_.metadata; }
  const std::vector<FileTensor>& tensors() const { return contents_.tensors; }
  std::uint64_t data_begin() const { return contents_.data_begin; }
  const FileTensor* find(std::string_view name) const;  // nullptr where there is none

  // The tensor's data, into as many bytes.
  void read(const FileTensor& tensor, std::span<std::byte> to) const;

 private:
  struct Descriptor {
    explicit Descriptor(int number) : fd(number) {}
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    const int fd;
  };

  void read(std::uint64_t begin, std::span<std::byte> to) const;

  std::filesystem::path path_;
  Descriptor descriptor_;
  GgufContents contents_;
  std::vector<const FileTensor*> by_name_;  // sorted
};

}  // namespace sbd
