#include "format/fingerprint.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace sbd {
namespace {

// SHA-256 (FIPS 180-4) of what is added.
class Sha256 {
 public:
  void add(std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes) add_byte(static_cast<std::uint8_t>(byte));
  }

  std::string hex() {
    const std::uint64_t bits = n_bytes_ * 8;
    add_byte(0x80);
    while (n_bytes_ % 64 != 56) add_byte(0);
    for (int shift = 56; shift >= 0; shift -= 8) add_byte(static_cast<std::uint8_t>(bits >> shift));
    constexpr char kDigits[] = "0123456789abcdef";
    std::string text;
    for (const std::uint32_t word : state_) {
      for (int shift = 28; shift >= 0; shift -= 4) text += kDigits[word >> shift & 15u];
    }
    return text;
  }

 private:
  static constexpr std::uint32_t kRounds[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
      0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
      0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
      0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
      0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
      0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
      0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
      0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
      0xc67178f2};

  void add_byte(std::uint8_t byte) {
    std::uint32_t& word = block_[n_bytes_ / 4 % 16];
    word = word << 8 | byte;
    if (++n_bytes_ % 64 == 0) mix_block();
  }

  void mix_block() {
    std::array<std::uint32_t, 64> w{};
    std::ranges::copy(block_, w.begin());
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
             (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t x = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                              ((e & f) ^ (~e & g)) + kRounds[i] + w[i];
      const std::uint32_t y =
          (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + x, d = c, c = b, b = a, a = x + y;
    }
    const std::array<std::uint32_t, 8> mixed{a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state_[i] += mixed[i];
  }

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint32_t, 16> block_{};
  std::uint64_t n_bytes_ = 0;
};

}  // namespace

std::string fingerprint(const GgufFile& model) {
  std::vector<const FileTensor*> tensors;
  for (const FileTensor& tensor : model.tensors()) {
    if (tensor.name != "output.weight" && tensor.name != "rope_freqs.weight") {
      tensors.push_back(&tensor);
    }
  }
  std::ranges::sort(tensors, {}, [](const FileTensor* tensor) { return tensor->name; });
  Sha256 digest;
  const auto add_line = [&](const std::string& line) {
    digest.add(std::as_bytes(std::span(line)));
    digest.add(std::as_bytes(std::span("\n", 1)));
  };
  add_line(model.metadata().string("general.architecture"));
  std::vector<std::byte> data;
  for (const FileTensor* tensor : tensors) {
    std::string line = tensor->name;
    for (const std::int64_t n : tensor->shape) line += " " + std::to_string(n);
    add_line(line);
    if (!tensor->name.ends_with("norm.weight") || tensor->dtype != DType::f32) continue;
    data.resize(tensor->n_bytes);
    model.read(*tensor, data);
    digest.add(data);
  }
  return digest.hex();
}

}  // namespace sbd
