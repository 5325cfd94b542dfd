// Writes GGUF images byte by byte, right ones and, where a field is overridden, wrong ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sbd::test {

// Value types of keys and types of tensors, by their numbers in the format.
namespace gguf_value {
inline constexpr std::uint32_t u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6,
                               boolean = 7, string = 8, array = 9, u64 = 10, i64 = 11, f64 = 12;
}
namespace gguf_tensor {
inline constexpr std::uint32_t f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8,
                               q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14, iq4_nl = 20,
                               iq4_xs = 23, bf16 = 30;
}

template <typename T>
std::string bytes_of(const T& value) {
  std::string out(sizeof value, '\0');
  std::memcpy(out.data(), &value, sizeof value);
  return out;
}

inline std::string gguf_string(std::string_view text) {
  return bytes_of(std::uint64_t{text.size()}) + std::string(text);
}

struct GgufTensor {
  std::string name;
  std::vector<std::uint64_t> dimensions;  // GGUF's order: the row's length first
  std::uint32_t type = gguf_tensor::f32;
  std::string data;
  std::optional<std::uint64_t> offset = {};  // instead of where the data is
};

struct GgufBuilder {
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::optional<std::uint64_t> tensor_count = {};  // instead of the real ones
  std::optional<std::uint64_t> key_value_count = {};
  std::uint64_t alignment = 32;
  std::vector<std::string> key_values;
  std::vector<GgufTensor> tensors;
  std::string trailing;

  GgufBuilder& key(std::string_view name, std::uint32_t type, const std::string& value) {
    key_values.push_back(gguf_string(name) + bytes_of(type) + value);
    return *this;
  }
  GgufBuilder& u32(std::string_view name, std::uint32_t value) {
    return key(name, gguf_value::u32, bytes_of(value));
  }
  GgufBuilder& f32(std::string_view name, float value) {
    return key(name, gguf_value::f32, bytes_of(value));
  }
  GgufBuilder& boolean(std::string_view name, bool value) {
    return key(name, gguf_value::boolean, bytes_of(value));
  }
  GgufBuilder& text(std::string_view name, std::string_view value) {
    return key(name, gguf_value::string, gguf_string(value));
  }
  GgufBuilder& strings(std::string_view name, const std::vector<std::string>& values) {
    std::string elements;
    for (const std::string& value : values) {
      elements += gguf_string(value);
    }
    return array(name, gguf_value::string, values.size(), elements);
  }
  GgufBuilder& i32s(std::string_view name, const std::vector<std::int32_t>& values) {
    std::string elements;
    for (const std::int32_t value : values) {
      elements += bytes_of(value);
    }
    return array(name, gguf_value::i32, values.size(), elements);
  }
  GgufBuilder& array(std::string_view name, std::uint32_t type, std::uint64_t length,
                     const std::string& elements) {
    return key(name, gguf_value::array, bytes_of(type) + bytes_of(length) + elements);
  }
  GgufBuilder& tensor(GgufTensor tensor) {
    tensors.push_back(std::move(tensor));
    return *this;
  }

  std::string build() const {
    std::string out = magic + bytes_of(version) + bytes_of(tensor_count.value_or(tensors.size())) +
                      bytes_of(key_value_count.value_or(key_values.size()));
    for (const std::string& entry : key_values) {
      out += entry;
    }
    std::string data;
    for (const GgufTensor& tensor : tensors) {
      out +=
          gguf_string(tensor.name) + bytes_of(static_cast<std::uint32_t>(tensor.dimensions.size()));
      for (const std::uint64_t size : tensor.dimensions) {
        out += bytes_of(size);
      }
      out += bytes_of(tensor.type) + bytes_of(tensor.offset.value_or(data.size()));
      data += tensor.data;
      pad(data);
    }
    pad(out);
    return out + data + trailing;
  }

 private:
  void pad(std::string& out) const {
    out.append((alignment - out.size() % alignment) % alignment, '\0');
  }
};

// A valid file of each kind of key and tensor: 2 layers, hidden_size 32, a vocabulary of 8 tokens.
inline GgufBuilder tiny_model(const std::string& architecture = "llama") {
  GgufBuilder builder;
  builder.alignment = 64;
  const auto name = [&](std::string_view key) { return architecture + "." + std::string(key); };
  builder.text("general.architecture", architecture).u32("general.alignment", 64);
  builder.u32(name("block_count"), 2)
      .u32(name("embedding_length"), 32)
      .u32(name("feed_forward_length"), 64)
      .u32(name("context_length"), 128)
      .u32(name("attention.head_count"), 4)
      .u32(name("attention.head_count_kv"), 2)
      .f32(name("attention.layer_norm_rms_epsilon"), 1e-5f)
      .f32(name("rope.freq_base"), 500000.0f);
  builder.strings("tokenizer.ggml.tokens",
                  {"<s>", "</s>", "<mask>", "a", "b", "c", "\xc3\xa9", ""});
  builder.array("tokenizer.ggml.scores", gguf_value::f32, 8, std::string(32, '\0'));
  builder.i32s("tokenizer.ggml.token_type", {3, 3, 3, 1, 1, 1, 1, 1});
  builder.u32("tokenizer.ggml.eos_token_id", 1).boolean("tokenizer.ggml.add_bos_token", true);
  builder.u32("sbd.mask_token_id", 2).u32("sbd.block_size", 4).f32("sbd.gamma", 0.1f);
  builder.tensor({"token_embd.weight", {32, 8}, gguf_tensor::f16, std::string(512, '\1')});
  builder.tensor({"output_norm.weight", {32}, gguf_tensor::f32, std::string(128, '\2')});
  builder.tensor({"blk.0.ffn_up.weight", {32, 64}, gguf_tensor::q8_0, std::string(64 * 34, '\3')});
  builder.tensor({"blk.1.ffn_up.weight", {32, 64}, gguf_tensor::q4_0, std::string(64 * 18, '\4')});
  builder.tensor({"blk.0.ffn_down.weight", {512, 3}, gguf_tensor::q4_k, std::string(864, '\5')});
  builder.tensor({"blk.1.ffn_down.weight", {512, 3}, gguf_tensor::q6_k, std::string(1260, '\6')});
  builder.tensor({"blk.1.attn_q.weight", {32, 32}, gguf_tensor::bf16, std::string(2048, '\7')});
  builder.tensor({"blk.0.attn_q.weight", {32, 32}, gguf_tensor::q4_1, std::string(640, '\10')});
  builder.tensor({"blk.0.attn_k.weight", {32, 16}, gguf_tensor::q5_0, std::string(352, '\11')});
  builder.tensor({"blk.0.attn_v.weight", {32, 16}, gguf_tensor::q5_1, std::string(384, '\12')});
  builder.tensor({"blk.1.attn_k.weight", {32, 16}, gguf_tensor::iq4_nl, std::string(288, '\13')});
  builder.tensor({"a", {256}, gguf_tensor::q2_k, std::string(84, '\14')});
  builder.tensor({"b", {256}, gguf_tensor::q3_k, std::string(110, '\15')});
  builder.tensor({"c", {256}, gguf_tensor::q5_k, std::string(176, '\16')});
  builder.tensor({"d", {256}, gguf_tensor::iq4_xs, std::string(136, '\17')});
  return builder;
}

}  // namespace sbd::test
