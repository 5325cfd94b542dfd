// The reader: right files give their values, and each defect gives its own line.
#include <sys/stat.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "check.h"
#include "format/gguf.h"
#include "format/text.h"
#include "gguf_builder.h"

namespace {

using namespace sbd;
using namespace sbd::test;
namespace value = gguf_value;
namespace tensor = gguf_tensor;

GgufContents parse(const std::string& image) {
  return parse_gguf(std::as_bytes(std::span(image)), "model.bin");
}
GgufContents parse(const GgufBuilder& builder) { return parse(builder.build()); }

std::string data_of(const FileTensor& tensor, const std::string& image) {
  return image.substr(tensor.offset, tensor.n_bytes);
}

template <typename T>
const T& entry(const GgufContents& contents, const char* key) {
  return std::get<T>(contents.metadata.entries().find(key)->second);
}

// One F32 tensor of 8 values, no key.
GgufTensor vector_of_8(const char* name) { return {name, {8}, tensor::f32, std::string(32, '\0')}; }

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "sbd-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) {
      throw std::runtime_error("no temporary folder");
    }
    path_ = pattern;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

  std::filesystem::path write(const char* name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace

TEST(gguf_reads_every_value_type) {
  GgufBuilder builder;
  builder.key("u8", value::u8, bytes_of(std::uint8_t{200}))
      .key("i8", value::i8, bytes_of(std::int8_t{-100}))
      .key("u16", value::u16, bytes_of(std::uint16_t{60000}))
      .key("i16", value::i16, bytes_of(std::int16_t{-30000}))
      .key("u32", value::u32, bytes_of(std::uint32_t{4000000000u}))
      .key("i32", value::i32, bytes_of(std::int32_t{-2000000000}))
      .key("u64", value::u64, bytes_of(std::uint64_t{INT64_MAX}))
      .key("i64", value::i64, bytes_of(std::int64_t{INT64_MIN}))
      .key("f32", value::f32, bytes_of(0.5f))
      .key("f64", value::f64, bytes_of(1e300))
      .key("inf", value::f32, bytes_of(HUGE_VALF))
      .key("yes", value::boolean, "\1")
      .text("text", "h\xc3\xa9")
      .array("booleans", value::boolean, 3, std::string("\1\0\1", 3))
      .array("bytes", value::u8, 3, "abc")
      .array("floats", value::f32, 2, bytes_of(1.5f) + bytes_of(-2.0f))
      .array("doubles", value::f64, 1, bytes_of(1e-300))
      .array("nothing", value::string, 0, "")
      .i32s("ids", {7, -1})
      .strings("words", {"", "two"});
  const GgufContents contents = parse(builder);
  const auto integer = [&](const char* key) { return entry<std::int64_t>(contents, key); };
  CHECK_EQ(integer("u8"), 200);
  CHECK_EQ(integer("i8"), -100);
  CHECK_EQ(integer("u16"), 60000);
  CHECK_EQ(integer("i16"), -30000);
  CHECK_EQ(integer("u32"), 4000000000);
  CHECK_EQ(integer("i32"), -2000000000);
  CHECK_EQ(integer("u64"), INT64_MAX);
  CHECK_EQ(integer("i64"), INT64_MIN);
  CHECK_EQ(entry<double>(contents, "f32"), 0.5);
  CHECK_EQ(entry<double>(contents, "f64"), 1e300);
  CHECK_EQ(entry<double>(contents, "inf"), HUGE_VAL);
  CHECK_EQ(entry<bool>(contents, "yes"), true);
  CHECK_EQ(entry<std::string>(contents, "text"), "h\xc3\xa9");
  CHECK_EQ(entry<std::vector<bool>>(contents, "booleans"), (std::vector<bool>{true, false, true}));
  CHECK_EQ(entry<std::vector<std::int64_t>>(contents, "bytes"),
           (std::vector<std::int64_t>{'a', 'b', 'c'}));
  CHECK_EQ(entry<std::vector<double>>(contents, "floats"), (std::vector<double>{1.5, -2.0}));
  CHECK_EQ(entry<std::vector<double>>(contents, "doubles"), (std::vector<double>{1e-300}));
  CHECK_EQ(entry<std::vector<std::string>>(contents, "nothing"), std::vector<std::string>{});
  CHECK_EQ(entry<std::vector<std::int64_t>>(contents, "ids"), (std::vector<std::int64_t>{7, -1}));
  CHECK_EQ(entry<std::vector<std::string>>(contents, "words"),
           (std::vector<std::string>{"", "two"}));
  CHECK_EQ(contents.metadata.entries().size(), 20);
}

TEST(gguf_reads_every_tensor_type) {
  const std::string image = tiny_model().build();
  const GgufContents contents = parse(image);
  const auto& tensors = contents.tensors;
  const DType types[] = {DType::f16,    DType::f32,  DType::q8_0, DType::q4_0, DType::q4_k,
                         DType::q6_k,   DType::bf16, DType::q4_1, DType::q5_0, DType::q5_1,
                         DType::iq4_nl, DType::q2_k, DType::q3_k, DType::q5_k, DType::iq4_xs};
  const std::size_t sizes[] = {512,     128,     64 * 34, 64 * 18, 6 * 144, 6 * 210, 2048, 640,
                               16 * 22, 16 * 24, 16 * 18, 84,      110,     176,     136};
  CHECK_EQ(tensors.size(), std::size(kDTypes));
  CHECK_EQ(tensors.size(), std::size(types));
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CHECK(tensors[i].dtype == types[i]);
    CHECK_EQ(data_of(tensors[i], image), std::string(sizes[i], static_cast<char>(i + 1)));
  }
  CHECK_EQ(tensors[0].name, "token_embd.weight");
  CHECK_EQ(tensors[0].shape, (std::vector<std::int64_t>{8, 32}));
  CHECK_EQ(tensors[1].shape, (std::vector<std::int64_t>{32}));
}

TEST(gguf_accepts_version_2_and_looser_files_without_our_keys) {
  GgufBuilder builder;
  builder.version = 2;
  builder.tensor(vector_of_8("a")).tensor(vector_of_8("b"));
  builder.tensors[0].offset = 32;  // the other way round
  builder.tensors[1].offset = 0;
  builder.trailing = "more";
  const std::string image = builder.build();
  const GgufContents contents = parse(image);
  CHECK_EQ(contents.tensors[0].offset - contents.tensors[1].offset, 32);
  builder.tensors[0].dimensions = {2, 2, 2, 1};
  CHECK_EQ(parse(builder).tensors[0].shape, (std::vector<std::int64_t>{1, 2, 2, 2}));
}

TEST(gguf_refuses_what_is_not_a_model) {
  CHECK_THROWS_WITH(parse(std::string()), "model.bin: the file is empty, expected a GGUF model");
  CHECK_THROWS_WITH(parse(std::string("GG")), "a file cut short");
  CHECK_THROWS_WITH(parse(std::string("Once upon a time")),
                    "it starts with 'Once', expected 'GGUF'");
  CHECK_THROWS_WITH(parse(bytes_of(std::uint64_t{2}) + "{}"),
                    "a safetensors file; convert its folder with: sbd-engine convert");
  CHECK_THROWS_WITH(parse(std::string("PK\x03\x04rest")), "a zip archive");
  CHECK_THROWS_WITH(parse(std::string("version https://git-lfs.github.com/spec/v1")),
                    "a Git LFS pointer; fetch the file itself with: git lfs pull");
}

TEST(gguf_refuses_other_versions) {
  GgufBuilder builder;
  builder.version = 1;
  CHECK_THROWS_WITH(parse(builder), "GGUF version 1, expected 2 or 3");
  builder.version = 4;
  CHECK_THROWS_WITH(parse(builder), "GGUF version 4, expected 2 or 3");
  builder.version = 0x03000000;
  CHECK_THROWS_WITH(parse(builder), "a big-endian GGUF file, expected a little-endian one");
}

TEST(gguf_refuses_every_truncation) {
  const std::string image = tiny_model().build();
  for (std::size_t size = 0; size < image.size(); ++size) {
    CHECK_THROWS_WITH(parse(image.substr(0, size)), "download or convert it again");
  }
  CHECK_THROWS_WITH(parse(image.substr(0, 20)),
                    "the header: wants 8 bytes at byte 16, but the file ends at 20");
}

TEST(gguf_refuses_absurd_counts) {
  GgufBuilder builder;
  builder.trailing = std::string(280, '\0');
  for (const std::uint64_t count :
       {std::uint64_t{21}, std::uint64_t{1} << 32, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    builder.tensor_count = 0;
    builder.key_value_count = count;
    CHECK_THROWS_WITH(parse(builder),
                      format("the header: {} keys of at least 14 bytes each, but 288 "
                             "bytes are left",
                             count));
    builder.key_value_count = 0;
    builder.tensor_count = count;
    CHECK_THROWS_WITH(parse(builder),
                      format("the header: {} tensors of at least 33 bytes each, but 288 "
                             "bytes are left",
                             count));
  }
}

TEST(gguf_refuses_absurd_string_lengths) {
  for (const std::uint64_t length :
       {std::uint64_t{13}, std::uint64_t{1} << 31, std::uint64_t{1} << 63, ~std::uint64_t{0} - 7}) {
    GgufBuilder builder;
    builder.key("k", value::string, bytes_of(length) + "short");
    builder.alignment = 1;
    CHECK_THROWS_WITH(parse(builder),
                      format("key 'k': a string of {} bytes at byte 37, but 5 are left", length));
  }
}

TEST(gguf_refuses_absurd_array_lengths) {
  for (const std::uint64_t length :
       {std::uint64_t{5}, std::uint64_t{1} << 32, std::uint64_t{1} << 61, std::uint64_t{1} << 63}) {
    for (const std::uint32_t type :
         {value::u32, value::f32, value::string, value::i64, value::f64}) {
      GgufBuilder builder;
      builder.alignment = 1;
      builder.array("k", type, length, std::string(16, '\0'));
      CHECK_THROWS_WITH(parse(builder), format("key 'k': {} array elements of at least", length));
    }
  }
}

TEST(gguf_refuses_more_array_elements_than_any_tokenizer_has) {
  GgufBuilder builder;
  const std::uint64_t half = (1 << 23) + 1;
  builder.array("a", value::u8, half, std::string(half, 'x'));
  builder.array("b", value::u8, half, std::string(half, 'x'));
  CHECK_THROWS_WITH(parse(builder), "key 'b': 16777218 array elements, but 16777216 is the most");
}

TEST(gguf_refuses_bad_values) {
  CHECK_THROWS_WITH(parse(GgufBuilder().key("k", 13, "abcd")),
                    "key 'k': value type 13, expected 0 to 12");
  CHECK_THROWS_WITH(parse(GgufBuilder().array("k", 99, 1, "abcd")),
                    "key 'k': an array of value type 99, expected 0 to 12");
  CHECK_THROWS_WITH(parse(GgufBuilder().array("k", value::array, 1, std::string(20, '\0'))),
                    "key 'k': an array of arrays");
  CHECK_THROWS_WITH(parse(GgufBuilder().key("k", value::boolean, "\2")),
                    "key 'k': a boolean of 2, expected 0 or 1");
  CHECK_THROWS_WITH(parse(GgufBuilder().array("k", value::boolean, 2, "\1\xff")),
                    "key 'k': a boolean of 255, expected 0 or 1");
  CHECK_THROWS_WITH(parse(GgufBuilder().key("k", value::u64, bytes_of(~std::uint64_t{0}))),
                    "key 'k': 18446744073709551615 is above the largest integer");
  CHECK_THROWS_WITH(parse(GgufBuilder().text("k", "\xff\n")),
                    R"(key 'k': the string '\xff\x0a' at byte 37 is not UTF-8)");
  CHECK_THROWS_WITH(parse(GgufBuilder().u32("", 1)), "a key is empty");
}

TEST(gguf_refuses_duplicates) {
  CHECK_THROWS_WITH(parse(GgufBuilder().u32("k", 1).text("k", "")),
                    "model.bin: key 'k' appears twice, expected once");
  CHECK_THROWS_WITH(parse(GgufBuilder().tensor(vector_of_8("t")).tensor(vector_of_8("t"))),
                    "tensor 't' appears twice, expected once");
}

TEST(gguf_refuses_bad_alignment) {
  for (const std::uint32_t alignment : {0u, 4u, 131072u, 0xffffffffu}) {
    CHECK_THROWS_WITH(parse(GgufBuilder().u32("general.alignment", alignment)),
                      format("key 'general.alignment' is {}, expected 8 to 65536", alignment));
  }
  CHECK_THROWS_WITH(parse(GgufBuilder().u32("general.alignment", 48)),
                    "key 'general.alignment' is 48, expected a power of two");
  CHECK_THROWS_WITH(parse(GgufBuilder().text("general.alignment", "64")),
                    "key 'general.alignment' is the string '64', expected an integer");
}

TEST(gguf_refuses_bad_shapes) {
  const auto with = [](std::vector<std::uint64_t> dimensions, std::uint32_t type = tensor::f32) {
    GgufBuilder builder;
    builder.tensor({"t", std::move(dimensions), type, std::string(256, '\0')});
    return parse(builder);
  };
  CHECK_THROWS_WITH(with({}), "tensor 't': 0 dimensions, expected 1 to 4");
  CHECK_THROWS_WITH(with({1, 1, 1, 1, 1}), "tensor 't': 5 dimensions, expected 1 to 4");
  CHECK_THROWS_WITH(with({0}), "tensor 't': dimension 0 is 0, expected 1 to");
  CHECK_THROWS_WITH(with({8, 0}), "tensor 't': dimension 1 is 0, expected 1 to");
  CHECK_THROWS_WITH(with({std::uint64_t{1} << 63}),
                    "tensor 't': dimension 0 is 9223372036854775808");
  // Products that wrap around 64 bits to something small: 2^32 * 2^32 * 4 = 0.
  const std::uint64_t big = std::uint64_t{1} << 32;
  CHECK_THROWS_WITH(with({big, big}), "tensor 't': its shape's size in bytes is beyond 64 bits");
  CHECK_THROWS_WITH(with({big, big, big, big}), "is beyond 64 bits");
  CHECK_THROWS_WITH(with({std::uint64_t{1} << 62}), "is beyond 64 bits");
  CHECK_THROWS_WITH(with({33}, tensor::q8_0),
                    "tensor 't': rows of 33 values, expected a multiple of 32");
  CHECK_THROWS_WITH(with({16, 2}, tensor::q4_0), "rows of 16 values, expected a multiple of 32");
  CHECK_THROWS_WITH(with({320}, tensor::q4_k),
                    "tensor 't': rows of 320 values, expected a multiple of 256 for Q4_K");
  CHECK_THROWS_WITH(with({128, 2}, tensor::q6_k), "rows of 128 values, expected a multiple of 256");
  CHECK_THROWS_WITH(parse(GgufBuilder().tensor(vector_of_8(""))), "a tensor's name is empty");
}

// Of types that the engine cannot run, and of such as came after it was written.
TEST(gguf_reads_tensors_of_other_types) {
  GgufBuilder builder;
  builder.tensor({"a", {256, 2}, 16, std::string(2 * 66, '\1')});
  builder.tensor({"b", {5, 7}, 99, std::string(100, '\2')});
  builder.tensor({"c", {32}, tensor::q4_1, std::string(20, '\3')});
  builder.tensor({"d", {1}, 0xffffffff, std::string(10, '\4')});
  const std::string image = builder.build();
  const auto tensors = parse(image).tensors;
  const std::string types[] = {"IQ2_XXS", "99", "Q4_1", "4294967295"};
  const std::size_t sizes[] = {132, 128, 20, 32};  // of unknown ones, with the padding
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    CHECK_EQ(tensors[i].type, types[i]);
    CHECK_EQ(tensors[i].dtype.has_value(), i == 2);
    CHECK_EQ(tensors[i].n_bytes, sizes[i]);
    CHECK_EQ(static_cast<int>(data_of(tensors[i], image)[0]), static_cast<int>(i) + 1);
  }
  CHECK_EQ(
      why_types_cannot_run(tensors),
      "tensor 'a': type IQ2_XXS, 99, 4294967295 cannot run here, expected F32, F16, BF16, Q8_0, "
      "Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS; convert the "
      "original checkpoint with: sbd-engine convert DIR --type q8_0");
  CHECK_EQ(why_types_cannot_run({tensors[2]}), "");
  CHECK_THROWS_WITH(parse(GgufBuilder().tensor({"t", {100}, 16, std::string(100, '\0')})),
                    "tensor 't': rows of 100 values, expected a multiple of 256 for IQ2_XXS");
  builder.u32("sbd.block_size", 4);  // tensors one after another, whatever they are
  CHECK_EQ(parse(builder).tensors.size(), 4);
}

TEST(gguf_refuses_unknown_tensors_outside_the_file) {
  GgufBuilder builder;
  builder.tensor({"t", {1}, 99, std::string(32, '\0'), 64});
  CHECK_THROWS_WITH(parse(builder),
                    "tensor 't': 0 bytes at offset 64 of the data section, but that has 32 bytes");
}

TEST(gguf_refuses_bad_offsets) {
  const auto with = [](std::uint64_t offset) {
    GgufBuilder builder;
    builder.tensor(vector_of_8("a")).tensor(vector_of_8("b"));
    builder.tensors[1].offset = offset;
    return parse(builder);
  };
  CHECK_EQ(with(32).tensors.size(), 2);
  CHECK_THROWS_WITH(with(33), "tensor 'b': data offset 33, expected a multiple of 32");
  CHECK_THROWS_WITH(with(64),
                    "tensor 'b': 32 bytes at offset 64 of the data section, but that has 64");
  CHECK_THROWS_WITH(with(~std::uint64_t{31}), "at offset 18446744073709551584 of the data section");
  CHECK_THROWS_WITH(with(0), "tensor 'b' starts at offset 0, expected 32 or more, where 'a' ends");
}

TEST(gguf_with_our_keys_has_exactly_its_length) {
  GgufBuilder builder = tiny_model();
  builder.tensors.resize(8);
  CHECK_EQ(parse(builder).tensors.size(), 8);
  const std::string image = builder.build();
  builder.trailing = std::string(1, '\0');
  CHECK_THROWS_WITH(parse(builder), format("the file has {} bytes, expected {} for its tensors",
                                           image.size() + 1, image.size()));
  builder.trailing = std::string(2048, '\0');
  builder.tensors[6].offset = 512 + 128 + 64 * 34 + 64 * 18 + 896 + 1280 + 64;
  builder.tensors[7].offset = *builder.tensors[6].offset + 2048;
  CHECK_THROWS_WITH(parse(builder),
                    "tensor 'blk.1.attn_q.weight' starts at offset 6208, expected 6144 "
                    "in a file with sbd.* keys");
}

TEST(gguf_error_lines_cannot_be_forged_by_names) {
  const std::string name = "x\n\x1b[2J\xe2\x80\xae" + std::string(5000, 'y');
  GgufBuilder builder;
  builder.tensor({name, {8}, tensor::q8_0, std::string(32, '\0')});
  CHECK_THROWS_WITH(parse(builder), R"(tensor 'x\x0a\x1b[2J\xe2\x80\xaeyyyyy)");
  CHECK_THROWS_WITH(parse(builder), "yyy...'");
}

TEST(utf8) {
  for (const char* good : {"", "plain text of more than eight", "h\xc3\xa9", "\xe2\x82\xac",
                           "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf", "12345678\xc2\x80"}) {
    CHECK(is_utf8(good));
  }
  // A lone continuation, cut sequences, overlong forms, a surrogate, beyond U+10FFFF.
  for (const char* bad : {"\x80", "\xc3", "12345678\xe2\x82", "\xf0\x9f\x98", "\xc0\x80",
                          "\xc1\xbf", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xed\xa0\x80",
                          "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\xff", "\xc3\x28"}) {
    CHECK(!is_utf8(bad));
  }
}

TEST(gguf_file_reads_a_file) {
  const TemporaryFolder folder;
  const std::string image = tiny_model().build();
  const GgufFile file(folder.write("model.bin", image));
  const GgufContents contents = parse(image);
  CHECK_EQ(file.tensors().size(), std::size(kDTypes));
  CHECK_EQ(file.data_begin(), contents.tensors[0].offset);
  CHECK_EQ(file.metadata().string("general.architecture"), "llama");
  CHECK(file.find("no such tensor") == nullptr);
  const FileTensor* found = file.find("blk.1.attn_q.weight");
  CHECK(found != nullptr && found->dtype == DType::bf16);
  for (const FileTensor& each : file.tensors()) {
    std::string data(each.n_bytes, '\0');
    file.read(each, std::as_writable_bytes(std::span(data)));
    CHECK_EQ(data, data_of(each, image));
  }
}

TEST(gguf_file_that_is_cut_short_meanwhile) {
  const TemporaryFolder folder;
  const std::string image = tiny_model().build();
  const auto path = folder.write("model.bin", image);
  const GgufFile file(path);
  const FileTensor& last = file.tensors().back();
  std::string data(last.n_bytes, '\0');
  std::filesystem::resize_file(path, last.offset + 1);
  CHECK_THROWS_WITH(file.read(last, std::as_writable_bytes(std::span(data))),
                    path.string() + ": the file was cut short to " +
                        std::to_string(last.offset + 1) + " bytes while it was read");
}

TEST(gguf_image_is_filled_as_far_as_it_is_looked_at) {
  const std::string whole = tiny_model().build();
  std::string image(whole.size(), '\0');
  std::uint64_t filled = 0;
  const GgufContents contents = parse_gguf(std::as_bytes(std::span(image)), "", [&](auto end) {
    CHECK(end <= whole.size());
    filled = std::max(filled, end);
    image.replace(0, filled, whole, 0, filled);
  });
  CHECK_EQ(contents.metadata.entries().size(), parse(whole).metadata.entries().size());
  CHECK(filled <= contents.data_begin);
  CHECK_EQ(contents.tensors.back().offset, parse(whole).tensors.back().offset);
}

TEST(gguf_file_names_what_the_system_refuses) {
  const TemporaryFolder folder;
  const auto kind = [](const std::filesystem::path& path) {
    try {
      const GgufFile file(path);
    } catch (const Error& error) {
      return error.kind();
    }
    return ErrorKind::memory;
  };
  const auto missing = folder.path() / "missing.bin";
  CHECK_THROWS_WITH(GgufFile(missing),
                    missing.string() + ": cannot open the model file: No such file");
  CHECK_EQ(kind(missing), ErrorKind::file);
  CHECK_THROWS_WITH(GgufFile(folder.path()),
                    "a folder, expected a model file; convert a checkpoint's "
                    "folder with: sbd-engine convert ");
  CHECK_EQ(kind(folder.path()), ErrorKind::file);
  const auto pipe = folder.path() / "pipe";
  CHECK_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  CHECK_THROWS_WITH(GgufFile(pipe), "a pipe or device, expected a model file");
  CHECK_EQ(kind(pipe), ErrorKind::file);
  const auto empty = folder.write("empty.bin", "");
  CHECK_THROWS_WITH(GgufFile(empty), empty.string() + ": the file is empty");
  CHECK_EQ(kind(empty), ErrorKind::value);
  const auto locked = folder.write("locked.bin", "GGUF");
  std::filesystem::permissions(locked, std::filesystem::perms::none);
  if (std::ifstream(locked).fail()) {  // root reads everything
    CHECK_THROWS_WITH(GgufFile(locked), "cannot open the model file: Permission denied");
  }
}
