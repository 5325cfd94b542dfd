// GGUF reader (versions 2 and 3, little-endian). The file is memory-mapped and trusted in nothing:
// every count, length, offset, type, shape and product is checked against the file's size before it
// is used or allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
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
  std::span<const std::byte> data;  // of an unknown type: all up to the next tensor
};

struct GgufContents {
  Metadata metadata;
  std::vector<FileTensor> tensors;  // in file order; names are unique
};

// Names the types among these that the engine cannot run, and the first tensor that has one; ""
// where it can run all.
std::string why_types_cannot_run(const std::vector<FileTensor>& tensors);

// Parses a whole file image; the tensors' data are views into it. `source` names the file in
// errors.
GgufContents parse_gguf(std::span<const std::byte> image, std::string_view source);

class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const Metadata& metadata() const { return contents_.metadata; }
  const std::vector<FileTensor>& tensors() const { return contents_.tensors; }
  const FileTensor* find(std::string_view name) const;  // nullptr where there is none

  // Lets the kernel drop the tensor's pages: its data was copied and will hardly be read again.
  void release(const FileTensor& tensor) const;

 private:
  explicit GgufFile(std::span<const std::byte> image) : image_(image) {}  // takes the mapping

  std::span<const std::byte> image_;
  GgufContents contents_;
  std::vector<const FileTensor*> by_name_;  // sorted
};

}  // namespace sbd
