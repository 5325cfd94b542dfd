#include "format/gguf.h"

#include <algorithm>
#include <bit>
#include <set>
#include <utility>

#include "core/error.h"
#include "format/gguf_cursor.h"
#include "format/tensor_types.h"
#include "format/text.h"

namespace sbd {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read without swapping bytes");

// The smallest a thing can be in the file. A count is checked against the bytes that are left
// before anything is allocated for it.
constexpr std::uint64_t kSmallestKeyValue = 14;  // key length, one letter, type, one byte
constexpr std::uint64_t kSmallestTensor = 33;  // name length, one letter, rank, size, type, offset
constexpr std::uint64_t kSmallestString = 8;   // its length

// Memory takes about 100 bytes for a key, 8 and more for an array's element. Ten times what the
// largest tokenizers have is enough, and bounds both in a huge hostile file too.
constexpr std::uint64_t kMaxKeyValues = 1 << 16;
constexpr std::uint64_t kMaxArrayElements = 1 << 24;  // of all arrays together
constexpr std::uint64_t kMaxTensors = 1 << 17;
constexpr std::uint64_t kBeginning = 32;  // bytes by which other formats are known

enum class ValueType : std::uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  string,
  array,
  u64,
  i64,
  f64
};

std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

class Parser {
 public:
  Parser(std::span<const std::byte> image, std::string_view source, const FillImage& fill)
      : image_(image), source_(source), cursor_(image, source, fill) {
    contents_.metadata = Metadata(std::string(source));
  }

  GgufContents parse() {
    read_header();
    for (std::uint64_t i = 0; i < key_value_count_; ++i) {
      read_key_value();
    }
    alignment_ = read_alignment();
    cursor_.check_count({"the header"}, "tensors", tensor_count_, kSmallestTensor);
    SBD_CHECK(tensor_count_ <= kMaxTensors, "{}: {} tensors, expected at most {}; {}", source_,
              tensor_count_, kMaxTensors, kAgain);
    contents_.tensors.reserve(tensor_count_);
    extents_.reserve(tensor_count_);
    for (std::uint64_t i = 0; i < tensor_count_; ++i) {
      read_tensor();
    }
    place_data();
    return std::move(contents_);
  }

 private:
  struct Extent {  // of a tensor's data, from the start of the data section
    std::uint64_t offset;
    std::uint64_t size;
    bool size_known;  // else the type is unknown: up to the next tensor
    std::uint64_t end() const { return offset + size; }
  };

  void read_header() {
    const Place header{"the header"};
    const std::string_view text = cursor_.peek(kBeginning);
    SBD_CHECK(!image_.empty(), "{}: the file is empty, expected a GGUF model; {}", source_, kAgain);
    if (!text.starts_with("GGUF")) {
      refuse_other_format(text);
    }
    cursor_.read<std::uint32_t>(header);
    const auto version = cursor_.read<std::uint32_t>(header);
    const std::uint32_t swapped = __builtin_bswap32(version);
    SBD_CHECK(
        swapped != 2 && swapped != 3,
        "{}: a big-endian GGUF file, expected a little-endian one; convert the checkpoint again",
        source_);
    SBD_CHECK(version == 2 || version == 3,
              "{}: GGUF version {}, expected 2 or 3; convert the checkpoint again", source_,
              version);
    tensor_count_ = cursor_.read<std::uint64_t>(header);
    key_value_count_ = cursor_.read<std::uint64_t>(header);
    cursor_.check_count(header, "keys", key_value_count_, kSmallestKeyValue);
    SBD_CHECK(key_value_count_ <= kMaxKeyValues, "{}: {} keys, expected at most {}; {}", source_,
              key_value_count_, kMaxKeyValues, kAgain);
  }

  [[noreturn]] void refuse_other_format(std::string_view text) const {
    constexpr std::string_view kConvert =
        "convert its folder with: sbd-engine convert DIR -o model.bin";
    std::string_view found = "something else";
    std::string_view mend = "give a file made by: sbd-engine convert DIR -o model.bin";
    if (text.size() > 8 && text[8] == '{') {
      found = "a safetensors file";
      mend = kConvert;
    } else if (text.starts_with("PK\x03\x04")) {
      found = "a zip archive, as PyTorch checkpoints are";
      mend = "save the checkpoint as safetensors and convert it with: sbd-engine convert";
    } else if (text.starts_with("version https://git-lfs")) {
      found = "a Git LFS pointer";
      mend = "fetch the file itself with: git lfs pull";
    } else if (std::string_view("GGUF").starts_with(text)) {
      found = "a file cut short";
      mend = kAgain;
    }
    fail(ErrorKind::value, "{}: not a GGUF model: it starts with {}, expected 'GGUF': {}; {}",
         source_, quote(text.substr(0, 4)), found, mend);
  }

  void read_key_value() {
    const std::string_view key = cursor_.read_string({"the next key"});
    SBD_CHECK(!key.empty(), "{}: a key is empty, expected a name; {}", source_, kAgain);
    const Place place{"key", key};
    const auto type = cursor_.read<std::uint32_t>(place);
    contents_.metadata.set(std::string(key), read_value(type, place));
  }

  MetadataValue read_value(std::uint32_t type, const Place& place) {
    switch (static_cast<ValueType>(type)) {
      case ValueType::u8: return read_integer<std::uint8_t>(place);
      case ValueType::i8: return read_integer<std::int8_t>(place);
      case ValueType::u16: return read_integer<std::uint16_t>(place);
      case ValueType::i16: return read_integer<std::int16_t>(place);
      case ValueType::u32: return read_integer<std::uint32_t>(place);
      case ValueType::i32: return read_integer<std::int32_t>(place);
      case ValueType::u64: return read_integer<std::uint64_t>(place);
      case ValueType::i64: return read_integer<std::int64_t>(place);
      case ValueType::f32: return static_cast<double>(cursor_.read<float>(place));
      case ValueType::f64: return cursor_.read<double>(place);
      case ValueType::boolean: return read_bool(place);
      case ValueType::string: return std::string(cursor_.read_string(place));
      case ValueType::array: return read_array(place);
    }
    fail(ErrorKind::value, "{}: {}: value type {}, expected 0 to 12; {}", source_, place, type,
         kAgain);
  }

  template <typename T>
  std::int64_t read_integer(const Place& place) {
    const T value = cursor_.read<T>(place);
    SBD_CHECK(std::in_range<std::int64_t>(value), "{}: {}: {} is above the largest integer, {}; {}",
              source_, place, value, INT64_MAX, kAgain);
    return static_cast<std::int64_t>(value);
  }

  bool read_bool(const Place& place) {
    const int value = cursor_.read<std::uint8_t>(place);
    SBD_CHECK(value <= 1, "{}: {}: a boolean of {}, expected 0 or 1; {}", source_, place, value,
              kAgain);
    return value == 1;
  }

  MetadataValue read_array(const Place& place) {
    const auto type = cursor_.read<std::uint32_t>(place);
    const auto length = cursor_.read<std::uint64_t>(place);
    switch (static_cast<ValueType>(type)) {
      case ValueType::u8: return read_integers<std::uint8_t>(length, place);
      case ValueType::i8: return read_integers<std::int8_t>(length, place);
      case ValueType::u16: return read_integers<std::uint16_t>(length, place);
      case ValueType::i16: return read_integers<std::int16_t>(length, place);
      case ValueType::u32: return read_integers<std::uint32_t>(length, place);
      case ValueType::i32: return read_integers<std::int32_t>(length, place);
      case ValueType::u64: return read_integers<std::uint64_t>(length, place);
      case ValueType::i64: return read_integers<std::int64_t>(length, place);
      case ValueType::f32:
        return read_elements<double>(length, sizeof(float), place,
                                     [&] { return cursor_.read<float>(place); });
      case ValueType::f64:
        return read_elements<double>(length, sizeof(double), place,
                                     [&] { return cursor_.read<double>(place); });
      case ValueType::boolean:
        return read_elements<bool>(length, 1, place, [&] { return read_bool(place); });
      case ValueType::string:
        return read_elements<std::string>(length, kSmallestString, place,
                                          [&] { return cursor_.read_string(place); });
      case ValueType::array:
        fail(ErrorKind::value, "{}: {}: an array of arrays, expected one of plain values; {}",
             source_, place, kAgain);
    }
    fail(ErrorKind::value, "{}: {}: an array of value type {}, expected 0 to 12; {}", source_,
         place, type, kAgain);
  }

  template <typename T>
  std::vector<std::int64_t> read_integers(std::uint64_t length, const Place& place) {
    return read_elements<std::int64_t>(length, sizeof(T), place,
                                       [&] { return read_integer<T>(place); });
  }

  template <typename T, typename Read>
  std::vector<T> read_elements(std::uint64_t length, std::uint64_t smallest, const Place& place,
                               Read read) {
    cursor_.check_count(place, "array elements", length, smallest);
    SBD_CHECK(length <= kMaxArrayElements - array_elements_,
              "{}: {}: {} array elements, but {} is the most of all arrays together; {}", source_,
              place, array_elements_ + length, kMaxArrayElements, kAgain);
    array_elements_ += length;
    std::vector<T> elements;
    elements.reserve(length);
    for (std::uint64_t i = 0; i < length; ++i) {
      elements.emplace_back(read());
    }
    return elements;
  }

  // Keeps every tensor's data aligned for the types it can have.
  std::uint64_t read_alignment() const {
    constexpr std::string_view kKey = "general.alignment";
    const Metadata& metadata = contents_.metadata;
    const std::int64_t alignment =
        metadata.contains(kKey) ? metadata.integer(kKey, 8, 1 << 16) : 32;
    SBD_CHECK(std::has_single_bit(static_cast<std::uint64_t>(alignment)),
              "{}: key '{}' is {}, expected a power of two; {}", source_, kKey, alignment, kAgain);
    return static_cast<std::uint64_t>(alignment);
  }

  void read_tensor() {
    const std::string_view name = cursor_.read_string({"the next tensor's name"});
    SBD_CHECK(!name.empty(), "{}: a tensor's name is empty; {}", source_, kAgain);
    const Place place{"tensor", name};
    SBD_CHECK(names_.insert(name).second, "{}: {} appears twice, expected once; {}", source_, place,
              kAgain);
    const auto rank = cursor_.read<std::uint32_t>(place);
    SBD_CHECK(rank >= 1 && rank <= 4, "{}: {}: {} dimensions, expected 1 to 4; {}", source_, place,
              rank, kAgain);
    FileTensor tensor;
    tensor.name = name;
    for (std::uint32_t i = 0; i < rank; ++i) {
      const auto size = cursor_.read<std::uint64_t>(place);
      SBD_CHECK(size >= 1 && size <= INT64_MAX, "{}: {}: dimension {} is {}, expected 1 to {}; {}",
                source_, place, i, size, INT64_MAX, kAgain);
      tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
    }
    const auto id = cursor_.read<std::uint32_t>(place);
    const TensorType* type = find_tensor_type(id);
    tensor.type = type != nullptr ? std::string(type->name) : std::to_string(id);
    if (type != nullptr) tensor.dtype = type->dtype;
    const std::uint64_t size = type != nullptr ? data_size(tensor, *type, place) : 0;
    extents_.push_back({cursor_.read<std::uint64_t>(place), size, type != nullptr});
    contents_.tensors.push_back(std::move(tensor));
  }

  // Of a tensor of a known type.
  std::uint64_t data_size(const FileTensor& tensor, const TensorType& type,
                          const Place& place) const {
    const auto row = static_cast<std::uint64_t>(tensor.shape.back());
    SBD_CHECK(row % type.values == 0,
              "{}: {}: rows of {} values, expected a multiple of {} for {}; {}", source_, place,
              row, type.values, type.name, kAgain);
    std::uint64_t size = type.bytes;
    bool overflow = __builtin_mul_overflow(size, row / type.values, &size);
    for (std::size_t i = 0; i + 1 < tensor.shape.size(); ++i) {
      overflow |= __builtin_mul_overflow(size, static_cast<std::uint64_t>(tensor.shape[i]), &size);
    }
    SBD_CHECK(!overflow, "{}: {}: its shape's size in bytes is beyond 64 bits, the file has {}; {}",
              source_, place, image_.size(), kAgain);
    return size;
  }

  // Gives every tensor its bytes of the data section, which follows the tensors' descriptions.
  void place_data() {
    const std::uint64_t start = align_up(cursor_.at(), alignment_);
    contents_.data_begin = start;
    const std::uint64_t available = image_.size() > start ? image_.size() - start : 0;
    const std::vector<std::size_t> order = by_offset();
    for (std::size_t i = 0; i < order.size(); ++i) {
      Extent& extent = extents_[order[i]];
      if (extent.size_known) continue;
      const std::uint64_t end = i + 1 < order.size() ? extents_[order[i + 1]].offset : available;
      extent.size = end > extent.offset ? end - extent.offset : 0;
    }
    for (std::size_t i = 0; i < extents_.size(); ++i) {
      FileTensor& tensor = contents_.tensors[i];
      const Place place{"tensor", tensor.name};
      const auto [offset, size, size_known] = extents_[i];
      SBD_CHECK(offset % alignment_ == 0, "{}: {}: data offset {}, expected a multiple of {}; {}",
                source_, place, offset, alignment_, kAgain);
      SBD_CHECK(offset <= available && size <= available - offset,
                "{}: {}: {} bytes at offset {} of the data section, but that has {} bytes; {}",
                source_, place, size, offset, available, kAgain);
      tensor.offset = start + offset;
      tensor.n_bytes = size;
    }
    check_overlap(order);
    const auto ours = contents_.metadata.entries().lower_bound("sbd.");
    if (ours != contents_.metadata.entries().end() && ours->first.starts_with("sbd.")) {
      check_tiling(start);
    }
  }

  std::vector<std::size_t> by_offset() const {  // indices of tensors
    std::vector<std::size_t> order(extents_.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
      order[i] = i;
    }
    std::ranges::sort(order, {}, [&](std::size_t i) { return extents_[i].offset; });
    return order;
  }

  void check_overlap(const std::vector<std::size_t>& order) const {
    for (std::size_t i = 1; i < order.size(); ++i) {
      const Extent& before = extents_[order[i - 1]];
      const Extent& after = extents_[order[i]];
      SBD_CHECK(before.end() <= after.offset,
                "{}: tensor {} starts at offset {}, expected {} or more, where {} ends; {}",
                source_, quote(contents_.tensors[order[i]].name), after.offset, before.end(),
                quote(contents_.tensors[order[i - 1]].name), kAgain);
    }
  }

  // A file with keys of ours has its tensors one after another, and nothing behind them.
  void check_tiling(std::uint64_t start) const {
    std::uint64_t expected = 0;
    for (std::size_t i = 0; i < extents_.size(); ++i) {
      SBD_CHECK(extents_[i].offset == expected,
                "{}: tensor {} starts at offset {}, expected {} in a file with sbd.* keys; {}",
                source_, quote(contents_.tensors[i].name), extents_[i].offset, expected, kAgain);
      expected = align_up(extents_[i].end(), alignment_);
    }
    SBD_CHECK(image_.size() == start + expected,
              "{}: the file has {} bytes, expected {} for its tensors; {}", source_, image_.size(),
              start + expected, kAgain);
  }

  std::span<const std::byte> image_;
  std::string_view source_;
  Cursor cursor_;
  std::uint64_t tensor_count_ = 0;
  std::uint64_t key_value_count_ = 0;
  std::uint64_t array_elements_ = 0;
  std::uint64_t alignment_ = 0;
  std::set<std::string_view> names_;  // a tree: no choice of names can make it slow
  std::vector<Extent> extents_;       // one for each tensor
  GgufContents contents_;
};

}  // namespace

std::string why_types_cannot_run(const std::vector<FileTensor>& tensors) {
  constexpr std::size_t kMaxNamed = 8;
  std::vector<std::string> types;
  for (const FileTensor& tensor : tensors) {
    if (tensor.dtype || types.size() == kMaxNamed) continue;
    if (std::ranges::find(types, tensor.type) == types.end()) types.push_back(tensor.type);
  }
  if (types.empty()) return {};
  const auto first = std::ranges::find_if(tensors, [](const auto& t) { return !t.dtype; });
  std::vector<std::string_view> expected;
  for (const TensorType& type : kTensorTypes) {
    if (type.dtype) expected.push_back(type.name);
  }
  return format(
      "tensor {}: type {} cannot run here, expected {}; convert the original checkpoint with: "
      "sbd-engine convert DIR --type q8_0",
      quote(first->name), joined(types), joined(expected));
}

GgufContents parse_gguf(std::span<const std::byte> image, std::string_view source,
                        const FillImage& fill) {
  return Parser(image, source, fill).parse();
}

}  // namespace sbd
