// What cuda_suite.sh measures, without Python:
//   tokens MODEL        SBD of 200 prompts on the GPU and on the CPU: how many texts are equal
//   time SHAPE TYPE     forwards of random weights, beside what the GPU's memory allows
#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/random.h"
#include "engine.h"
#include "format/metadata.h"

namespace sbd {
namespace {

struct Shape {
  const char* architecture;
  int hidden, intermediate, layers, heads, kv_heads, head_dim, vocab;
  bool tied;

  // Values of the matrices that a forward reads.
  double weights() const {
    const double attention = 2.0 * hidden * (heads + kv_heads) * head_dim;
    return layers * (attention + 3.0 * hidden * intermediate) + static_cast<double>(hidden) * vocab;
  }
  double kv_bytes(int keys) const {
    return 4.0 * layers * kv_heads * head_dim * keys;
  }  // in halves
};

const std::map<std::string, Shape> kShapes = {
    {"llama-3.1-8b", {"llama", 4096, 14336, 32, 32, 8, 128, 128256, false}},
    {"qwen3-8b", {"qwen3", 4096, 12288, 36, 32, 8, 128, 151936, false}},
    {"qwen3-0.6b", {"qwen3", 1024, 3072, 28, 16, 8, 128, 151936, true}},
};
const std::map<std::string, std::pair<DType, double>> kBytesPerWeight = {
    {"f32", {DType::f32, 4.0}},         {"f16", {DType::f16, 2.0}},
    {"bf16", {DType::bf16, 2.0}},       {"q8_0", {DType::q8_0, 34.0 / 32}},
    {"q4_0", {DType::q4_0, 18.0 / 32}},
};

Metadata metadata_of(const Shape& s) {
  Metadata metadata("shape");
  const std::string prefix = std::string(s.architecture) + ".";
  const auto integer = [&](const char* key, int value) {
    metadata.set(prefix + key, std::int64_t{value});
  };
  metadata.set("general.architecture", std::string(s.architecture));
  integer("block_count", s.layers);
  integer("embedding_length", s.hidden);
  integer("feed_forward_length", s.intermediate);
  integer("context_length", 40960);
  integer("attention.head_count", s.heads);
  integer("attention.head_count_kv", s.kv_heads);
  integer("attention.key_length", s.head_dim);
  metadata.set(prefix + "attention.layer_norm_rms_epsilon", 1e-5);
  metadata.set(prefix + "rope.freq_base", 1e6);
  integer("vocab_size", s.vocab);
  metadata.set("tokenizer.ggml.eos_token_id", std::int64_t{0});
  return metadata;
}

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
}

void time_shape(const std::string& name, const std::string& type) {
  SBD_CHECK(kShapes.contains(name), "shape {}: expected one of cuda_suite.sh's list", name);
  SBD_CHECK(kBytesPerWeight.contains(type), "type {}: expected f32, f16, bf16, q8_0 or q4_0", type);
  const Shape& shape = kShapes.at(name);
  const auto& [dtype, bytes] = kBytesPerWeight.at(type);
  const std::vector<int> rows = {1, 2, 4, 8, 16, 32, 64};
  Engine engine(metadata_of(shape), dtype, shape.tied, {.device = "cuda", .n_ctx = 33024});
  const double bandwidth = engine.measure_peaks().read;
  std::printf("%s %s on %s, a copy moves %.0f GB/s\n", name.c_str(), type.c_str(),
              engine.device().c_str(), bandwidth / 1e9);
  std::printf("%8s %5s %10s %10s %10s %12s\n", "context", "rows", "ms", "x one row", "floor ms",
              "of bandwidth");
  for (const int context : {256, 1024, 4096, 32768}) {
    const auto samples = engine.time_forwards(rows, context, 21);
    std::map<int, double> ms;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ms[rows[i]] = median(samples[i]);
      const double floor =
          (shape.weights() * bytes + shape.kv_bytes(context + rows[i])) / bandwidth * 1e3;
      std::printf("%8d %5d %10.3f %10.2f %10.3f %11.1f%%\n", context, rows[i], ms[rows[i]],
                  ms[rows[i]] / ms[1], floor, 100 * floor / ms[rows[i]]);
    }
    // Set Block Decoding's wall-clock speedup at the paper's NFE reductions, k = 16 (2509.04185).
    for (const double reduction : {2.2, 3.9}) {
      const double forwards = 16 / reduction;
      std::printf("%8d speedup at an NFE reduction of %.1f: %.2f\n", context, reduction,
                  16 * ms[1] / (ms[32] + (forwards - 1) * ms[16]));
    }
  }
}

std::vector<TokenId> generate(Engine& engine, std::uint64_t prompt) {
  Request request;
  const auto vocab = static_cast<std::uint64_t>(engine.config().vocab_size - 2);
  for (std::uint64_t i = 0; i < 8; ++i) {
    request.prompt.push_back(static_cast<TokenId>(combine(prompt, i) % vocab));
  }
  request.max_tokens = 64;
  request.ignore_eos = true;
  engine.add(request);
  std::vector<TokenId> text;
  for (;;) {
    for (const SequenceEvents& events : engine.step()) {
      SBD_CHECK(events.error.empty(), "{}", events.error);
      text.insert(text.end(), events.events.committed.begin(), events.events.committed.end());
      if (events.events.finished) return text;
    }
  }
}

void compare_tokens(const std::string& path) {
  Engine gpu(path, {.device = "cuda", .n_ctx = 128}), cpu(path, {.device = "cpu", .n_ctx = 128});
  int equal = 0;
  constexpr int kPrompts = 200;
  for (int prompt = 0; prompt < kPrompts; ++prompt) {
    const auto seed = static_cast<std::uint64_t>(prompt);
    const auto on_gpu = generate(gpu, seed), on_cpu = generate(cpu, seed);
    if (on_gpu == on_cpu) {
      ++equal;
      continue;
    }
    const auto at = std::ranges::mismatch(on_gpu, on_cpu).in1 - on_gpu.begin();
    std::printf("prompt %d: differs from token %td on\n", prompt, at);
  }
  std::printf("%d of %d texts are equal\n", equal, kPrompts);
}

}  // namespace
}  // namespace sbd

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  try {
    if (args.size() == 2 && args[0] == "tokens") {
      sbd::compare_tokens(args[1]);
    } else if (args.size() == 3 && args[0] == "time") {
      sbd::time_shape(args[1], args[2]);
    } else {
      std::fprintf(stderr, "expected: tokens MODEL | time SHAPE TYPE\n");
      return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
