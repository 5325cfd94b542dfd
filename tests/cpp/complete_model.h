// Complete model files, as small as their types allow: every tensor that the engine asks for, with
// values that give finite logits. And a file that lives in memory, to load them from.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/random.h"
#include "format/tensor_types.h"
#include "gguf_builder.h"

namespace sbd::test {

struct ModelShape {
  std::string architecture;
  std::uint32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab;
  std::vector<std::uint32_t> matrix_types;  // taken in turn
  bool tied = false;
  bool rope_freqs = false;
  bool sbd = true;  // has the keys of set block decoding
};

// A tensor of `type` whose values are a function of its name and size: random signs and mantissas,
// sizes below 1/3; 1-D weights (norms and RoPE's divisors) lie from 1/2 to 3/2.
inline GgufTensor filled_tensor(const std::string& name, std::vector<std::uint64_t> dimensions,
                                std::uint32_t type) {
  std::uint64_t n = 1;
  for (const std::uint64_t size : dimensions) n *= size;
  std::uint64_t key = n;
  for (const char c : name) key = combine(key, static_cast<unsigned char>(c));

  const bool is_weight = dimensions.size() == 1 && name.ends_with(".weight");
  const DType dtype = *find_tensor_type(type)->dtype;
  const auto block = static_cast<std::uint64_t>(values_per_block(dtype));
  std::string data;
  const auto random_bytes = [&](std::uint64_t count) {
    for (; count > 0; --count) data += static_cast<char>(mix64(key + data.size()));
  };
  const auto halves = [&](std::uint16_t scale, std::uint16_t min) {
    data += bytes_of(scale) + bytes_of(min);
  };
  for (std::uint64_t i = 0; i < n / block; ++i) {
    const std::uint64_t bits = combine(key, i);
    switch (type) {
      case gguf_tensor::f32:
        data += bytes_of((is_weight ? 1.0f : 0.0f) +
                         (uniform(key, i) - 0.5f) * (is_weight ? 1.0f : 0.6f));
        break;
      case gguf_tensor::f16:  // exponents of 1/8 and 1/16
        data += bytes_of(static_cast<std::uint16_t>((bits & 0x87ff) | 0x2800));
        break;
      case gguf_tensor::bf16:  // exponents of 1/8 and 1/4
        data += bytes_of(static_cast<std::uint16_t>((bits & 0x807f) | 0x3e00));
        break;
      case gguf_tensor::q8_0:
        data += bytes_of(std::uint16_t{0x1800});  // scale 1/512
        random_bytes(32);
        break;
      case gguf_tensor::q4_0:
        data += bytes_of(std::uint16_t{0x2800});  // scale 1/32
        random_bytes(16);
        break;
      case gguf_tensor::q4_1:
        halves(0x2800, 0xb400);  // 1/32, -1/4
        random_bytes(16);
        break;
      case gguf_tensor::q5_0:
        data += bytes_of(std::uint16_t{0x2400});  // scale 1/64
        random_bytes(20);
        break;
      case gguf_tensor::q5_1:
        halves(0x2400, 0xb400);  // 1/64, -1/4
        random_bytes(20);
        break;
      case gguf_tensor::iq4_nl:
        data += bytes_of(std::uint16_t{0x1800});  // scale 1/512
        random_bytes(16);
        break;
      case gguf_tensor::q2_k:
        random_bytes(80);
        halves(0x1c00, 0x1c00);  // 2^-8
        break;
      case gguf_tensor::q3_k:
        random_bytes(108);
        data += bytes_of(std::uint16_t{0x1800});  // scale 1/512
        break;
      case gguf_tensor::q4_k:
        halves(0x0c00, 0x1800);  // 2^-12, 2^-9
        random_bytes(140);
        break;
      case gguf_tensor::q5_k:
        halves(0x0800, 0x1800);  // 2^-13, 2^-9
        random_bytes(172);
        break;
      case gguf_tensor::q6_k:
        random_bytes(208);
        data += bytes_of(std::uint16_t{0x0400});  // scale 2^-14
        break;
      case gguf_tensor::iq4_xs:
        data += bytes_of(std::uint16_t{0x0400});  // scale 2^-14
        random_bytes(134);
        break;
    }
  }
  return {name, std::move(dimensions), type, std::move(data)};
}

inline GgufBuilder complete_model(const ModelShape& m) {
  GgufBuilder builder;
  const auto name = [&](std::string_view key) { return m.architecture + "." + std::string(key); };
  builder.text("general.architecture", m.architecture);
  builder.u32(name("block_count"), m.layers)
      .u32(name("embedding_length"), m.hidden)
      .u32(name("feed_forward_length"), m.intermediate)
      .u32(name("context_length"), 64)
      .u32(name("attention.head_count"), m.heads)
      .u32(name("attention.head_count_kv"), m.kv_heads)
      .u32(name("attention.key_length"), m.head_dim)
      .f32(name("attention.layer_norm_rms_epsilon"), 1e-5f)
      .f32(name("rope.freq_base"), 10000.0f)
      .u32(name("vocab_size"), m.vocab);
  builder.u32("tokenizer.ggml.eos_token_id", m.vocab - 1);
  if (m.sbd) {
    builder.u32("sbd.mask_token_id", m.vocab - 2).u32("sbd.block_size", 4).f32("sbd.gamma", 0.1f);
  }

  const std::uint64_t hidden = m.hidden;
  const std::uint64_t q_size = std::uint64_t{m.heads} * m.head_dim;
  const std::uint64_t kv_size = std::uint64_t{m.kv_heads} * m.head_dim;
  std::size_t n_matrices = 0;
  const auto matrix = [&](const std::string& tensor, std::uint64_t rows, std::uint64_t cols) {
    const std::uint32_t type = m.matrix_types[n_matrices++ % m.matrix_types.size()];
    builder.tensor(filled_tensor(tensor, {cols, rows}, type));
  };
  const auto vector = [&](const std::string& tensor, std::uint64_t n) {
    builder.tensor(filled_tensor(tensor, {n}, gguf_tensor::f32));
  };
  matrix("token_embd.weight", m.vocab, hidden);
  for (std::uint32_t i = 0; i < m.layers; ++i) {
    const std::string layer = "blk." + std::to_string(i) + ".";
    vector(layer + "attn_norm.weight", hidden);
    matrix(layer + "attn_q.weight", q_size, hidden);
    matrix(layer + "attn_k.weight", kv_size, hidden);
    matrix(layer + "attn_v.weight", kv_size, hidden);
    if (m.architecture == "qwen2") {
      vector(layer + "attn_q.bias", q_size);
      vector(layer + "attn_k.bias", kv_size);
      vector(layer + "attn_v.bias", kv_size);
    }
    if (m.architecture == "qwen3") {
      vector(layer + "attn_q_norm.weight", m.head_dim);
      vector(layer + "attn_k_norm.weight", m.head_dim);
    }
    matrix(layer + "attn_output.weight", hidden, q_size);
    if (m.architecture == "qwen2") vector(layer + "attn_output.bias", hidden);  // optional
    vector(layer + "ffn_norm.weight", hidden);
    matrix(layer + "ffn_gate.weight", m.intermediate, hidden);
    matrix(layer + "ffn_up.weight", m.intermediate, hidden);
    matrix(layer + "ffn_down.weight", hidden, m.intermediate);
  }
  vector("output_norm.weight", hidden);
  if (!m.tied) matrix("output.weight", m.vocab, hidden);
  if (m.rope_freqs) vector("rope_freqs.weight", m.head_dim / 2);
  return builder;
}

// A draft adapter for it: two factors of each matrix, in ranks that differ, and a mask.
inline GgufBuilder complete_adapter(const ModelShape& m) {
  GgufBuilder builder;
  builder.text("general.type", "adapter").text("adapter.type", "lora");
  builder.text("general.architecture", m.architecture).f32("adapter.lora.alpha", 2.0f);
  builder.u32("sbd.block_size", 3)
      .array("sbd.draft.acceptance", gguf_value::f32, 2, bytes_of(0.5f) + bytes_of(0.25f));
  const std::uint64_t hidden = m.hidden, inner = m.intermediate;
  const std::uint64_t q_size = std::uint64_t{m.heads} * m.head_dim;
  const std::uint64_t kv_size = std::uint64_t{m.kv_heads} * m.head_dim;
  const struct {
    const char* name;
    std::uint64_t out, in;
  } places[] = {{"attn_q", q_size, hidden},  {"attn_k", kv_size, hidden},
                {"attn_v", kv_size, hidden}, {"attn_output", hidden, q_size},
                {"ffn_gate", inner, hidden}, {"ffn_up", inner, hidden},
                {"ffn_down", hidden, inner}};
  std::uint64_t n = 0;
  for (std::uint32_t i = 0; i < m.layers; ++i) {
    for (const auto& [place, out, in] : places) {
      const std::string name = "blk." + std::to_string(i) + "." + place + ".weight.lora_";
      const std::uint32_t type = n % 2 == 0 ? gguf_tensor::f16 : gguf_tensor::f32;
      const std::uint64_t rank = 1 + n++ % std::min(out, in);
      builder.tensor(filled_tensor(name + 'a', {in, rank}, type));
      builder.tensor(filled_tensor(name + 'b', {rank, out}, type));
    }
  }
  return builder.tensor(filled_tensor("sbd.draft.mask_embedding", {hidden}, gguf_tensor::f32));
}

// Every architecture, tied and untied, every type, sizes that fill the kernels' lanes and sizes
// that do not, with and without the keys of set block decoding.
inline std::vector<ModelShape> complete_models() {
  using namespace gguf_tensor;
  return {
      {"llama", 1, 32, 32, 2, 1, 16, 8, {q8_0, q4_0, f32, q4_1}, false, true, true},
      {"qwen2", 2, 10, 7, 2, 1, 6, 20, {f16, bf16, f32}, true, false, true},
      {"qwen3", 1, 32, 32, 4, 2, 8, 17, {q4_0, bf16, q8_0, f16}, true, false, true},
      {"llama", 1, 8, 9, 1, 1, 4, 9, {f32}, false, false, false},
      {"qwen3", 2, 6, 5, 3, 3, 2, 8, {bf16}, false, false, false},
      {"qwen3", 1, 256, 256, 4, 1, 64, 9, {q6_k, q4_k, q4_k}, true, false, true},
      {"llama", 1, 32, 32, 2, 1, 16, 8, {q5_0, q5_1, iq4_nl}, true, false, true},
      {"qwen3", 1, 256, 256, 4, 1, 64, 9, {q3_k, q5_k, iq4_xs, q2_k}, true, false, true},
  };
}

// A file without a name on any disk; the path is good while the object lives.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view image) : fd_(::memfd_create("model", MFD_CLOEXEC)) {
    if (fd_ < 0 || ::write(fd_, image.data(), image.size()) != static_cast<ssize_t>(image.size())) {
      throw std::runtime_error("cannot write a file in memory");
    }
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

}  // namespace sbd::test
