// What a fuzzed file goes through, each stage with the memory it may take: read, then load and
// generate. A stage returns the line of its sbd::Error, or nothing; whatever else it throws is a
// failure.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "complete_model.h"
#include "core/error.h"
#include "decode/registry.h"
#include "decode_defaults.h"
#include "engine.h"
#include "format/gguf.h"
#include "format/model_config.h"

namespace fuzz {

struct Claims {  // what a file says it is
  sbd::ModelConfig config;
  sbd::DecoderOptions defaults;
};

// Keys, configuration (an adapter's is its model's), and every byte of every tensor.
inline std::string read_stage(const std::string& image, const std::string& model,
                              std::optional<Claims>& claims) {
  try {
    const auto contents = sbd::parse_gguf(std::as_bytes(std::span(image)), "fuzz");
    unsigned sum = 0;
    for (const sbd::FileTensor& tensor : contents.tensors) {
      double values = 1;  // in floating point, so that no product wraps around
      for (const std::int64_t dimension : tensor.shape) {
        values *= static_cast<double>(dimension);
      }
      const sbd::DType type = tensor.dtype.value_or(sbd::DType::f32);
      const double blocks = values / sbd::values_per_block(type);
      if (tensor.dtype && blocks * static_cast<double>(sbd::bytes_per_block(type)) !=
                              static_cast<double>(tensor.n_bytes)) {
        throw std::logic_error("a tensor's data do not have its shape's size");
      }
      for (const char byte : std::string_view(image).substr(tensor.offset, tensor.n_bytes)) {
        sum += static_cast<unsigned>(byte);
      }
    }
    volatile unsigned sink = sum;
    static_cast<void>(sink);
    const auto configured = [&claims](const sbd::GgufContents& file) {
      const auto config = sbd::read_model_config(file.metadata, file.tensors);
      claims = {config, sbd::read_decode_defaults(file.metadata, config)};
    };
    configured(model.empty() ? contents
                             : sbd::parse_gguf(std::as_bytes(std::span(model)), "model"));
  } catch (const sbd::Error& error) {
    return error.what();
  }
  return {};
}

// Keys, arrays and descriptions in memory take up to eight times their bytes in the file (an array
// of bytes becomes one of 64 bits, a key of 16 bytes a node of 112); an error's line and stream,
// 16 KiB.
inline std::size_t read_heap(std::size_t image_size) { return 8 * image_size + (16 << 10); }

inline constexpr int kMaxTokens = 5;
inline constexpr int kMaxSteps = 10;

inline std::vector<sbd::TokenId> generate(sbd::Engine& engine, const sbd::Request& request) {
  const sbd::SequenceId id = engine.add(request);
  const int vocab_size = engine.config().vocab_size;
  std::vector<sbd::TokenId> tokens;
  bool finished = false;
  for (int step = 0; step < kMaxSteps && !finished; ++step) {
    for (const sbd::SequenceEvents& sequence : engine.step()) {
      if (!sequence.error.empty()) throw sbd::Error(sbd::ErrorKind::value, sequence.error);
      finished = sequence.events.finished.has_value();
      for (const sbd::TokenId token : sequence.events.committed) {
        tokens.push_back(token);
        if (token < 0 || token >= vocab_size || token == engine.config().mask_token_id) {
          throw std::logic_error("committed token " + std::to_string(token));
        }
      }
    }
  }
  engine.remove(id);
  if (tokens.size() > kMaxTokens) {
    throw std::logic_error("more tokens than were asked for");
  }
  return tokens;
}

inline bool accepts(const sbd::Engine& engine, const sbd::Request& request) {
  try {
    engine.check(request);
  } catch (const sbd::Error&) {
    return false;
  }
  return true;
}

// Whatever is in an adapter, the text is the model's own.
inline void check_drafts(sbd::Engine& engine, sbd::Request request) {
  request.decoder = "ntp";
  const auto expected = generate(engine, request);
  request.decoder = "sbd_lossless";
  if (generate(engine, request) != expected) {
    throw std::logic_error("an adapter changes the text");
  }
}

// A whole load and a few tokens: greedily with the file's own decoders, then with one of all there
// are, sampled, where the file can run it.
inline std::string load_stage(const std::string& image, const std::string& model) {
  try {
    const sbd::test::MemoryFile file(image), beside(model);
    sbd::EngineOptions options{.n_threads = 1};
    if (!model.empty()) options.draft = file.path();
    sbd::Engine engine(model.empty() ? file.path() : beside.path(), options);
    sbd::Request request;
    request.prompt = {0, std::min(1, engine.config().vocab_size - 1)};
    request.max_tokens = kMaxTokens;
    if (!model.empty()) check_drafts(engine, request);
    for (const std::string& decoder : engine.defaults().named) {
      request.decoder = decoder;
      generate(engine, request);
    }
    constexpr const char* kRules[] = {"entropy_bounded", "factor", "confidence", "top_n"};
    const std::vector<std::string> names = sbd::decoder_names();
    request.decoder = names[image.size() % names.size()];
    request.options["unmask"] = kRules[image.size() / names.size() % std::size(kRules)];
    request.temperature = 0.8f;
    request.top_k = 5;
    request.top_p = 0.9f;
    if (accepts(engine, request)) generate(engine, request);
  } catch (const sbd::Error& error) {
    return error.what();
  }
  return {};
}

// Twice what reading takes, as the engine keeps the keys beyond the file; the LM head's tile of
// 128 KiB; and the rows of a forward, which are at most a decided block, a block of masks and the
// prompt. A row takes its activations, their copies in the weights' types, attention's partial
// results (of at least 32 queries) and logits: no more than 8 floats for each number in it.
inline std::size_t load_heap(std::size_t image_size, const Claims& claims) {
  const auto& c = claims.config;
  const std::size_t rows =
      32 + 2 * static_cast<std::size_t>(claims.defaults.block.block_size.value_or(0));
  const std::size_t heads = static_cast<std::size_t>(c.num_attention_heads + c.num_key_value_heads);
  const std::size_t head_dim = static_cast<std::size_t>(c.head_dim + 15) / 16 * 16;
  const std::size_t row = static_cast<std::size_t>(c.hidden_size + c.intermediate_size) +
                          heads * head_dim + static_cast<std::size_t>(c.vocab_size);
  return 2 * read_heap(image_size) + (128 << 10) + rows * row * 8 * sizeof(float);
}

// The file itself, its matrices in panels of 32 rows (one row alone is padded to 32) in chunks of
// 64 MiB, each with room to begin on a huge page, and an F16 KV cache of the whole context,
// head_dim rounded up to 16 and positions to 64. In floating point: a context may justify more than
// there are addresses.
inline double load_mapped(std::size_t image_size, const Claims& claims) {
  const auto& c = claims.config;
  const double positions = std::ceil(c.max_position_embeddings / 64.0) * 64;
  const double head_dim = std::ceil(c.head_dim / 16.0) * 16;
  return 34.0 * static_cast<double>(image_size) + (66 << 20) +
         2.0 * c.num_hidden_layers * c.num_key_value_heads * positions * head_dim * 2;
}

}  // namespace fuzz
