// Mutation fuzzer of model files and draft adapters, from the first byte to generated tokens:
//   fuzz_gguf [--iterations N] [--seed S] [--only I] [FILE...]
//
// Every case is a valid image (built in, and the given files, best below 64 KiB) with a few
// mutations. It is read whole and, where that succeeds, loaded to generate a few tokens (stages.h).
// It must end in success or in an sbd::Error of one line, within a second of the processor's and
// within the memory that the image justifies. --only repeats a single case. Meant to be built with
// AddressSanitizer and UBSan.
#include <signal.h>

#include <cstdio>
#include <ctime>
#include <fstream>
#include <set>
#include <sstream>

#include "memory_meter.h"
#include "mutate.h"
#include "stages.h"

namespace {

using fuzz::Seed;

// An error's kind: its line's words, without what is quoted from the file, names and numbers.
std::string outline(std::string message) {
  const std::size_t quote = message.find('\'');
  if (quote != std::string::npos) {
    message.erase(quote, message.rfind('\'') + 1 - quote);
  }
  std::istringstream words(message);
  std::string out;
  for (std::string word; words >> word;) {
    if (word.find_first_of("0123456789_.[") == std::string::npos) {
      out += word + " ";
    }
  }
  return out;
}

constexpr unsigned kHangsAfter = 60;  // seconds

std::uint64_t current_case = 0;

void report_case() {
  std::fprintf(stderr, "in case %llu (repeat with --only)\n",
               static_cast<unsigned long long>(current_case));
}

void on_alarm(int) {
  report_case();
  std::fprintf(stderr, "no end within %u s\n", kHangsAfter);
  std::_Exit(1);
}

// Files with the other keys of decoding: this engine's own methods, and two families.
std::vector<sbd::test::GgufBuilder> decoded_otherwise() {
  const auto shapes = sbd::test::complete_models();
  auto own = sbd::test::complete_model(shapes[1]);
  own.strings("sbd.decoders", {"dmtd", "d2f", "sbd_lossless", "nemotron_spec"})
      .i32s("sbd.dmtd.layers", {0, 1, 1})
      .u32("sbd.dmtd.horizon", 2)
      .text("sbd.dmtd.prompt_rule", "train")
      .f32("sbd.d2f.block_add_threshold", 0.25f)
      .f32("sbd.d2f.decoded_token_threshold", 0.5f)
      .f32("sbd.d2f.skip_threshold", 0.25f)
      .text("sbd.unmask", "factor")
      .f32("sbd.factor", 0.5f);
  auto cached = sbd::test::complete_model(shapes[0]);
  cached.strings("sbd.decoders", {"fast_dllm_v2", "sdar", "d2f"})
      .u32("sbd.sub_block_size", 2)
      .u32("sbd.steps", 3)
      .text("sbd.unmask", "confidence")
      .f32("sbd.threshold", 0.5f)
      .u32("sbd.logit_shift", 1)
      .u32("sbd.seed_slot", 1)
      .text("sbd.block_origin", "absolute")
      .text("sbd.prompt_attention", "block_causal")
      .text("sbd.commit_attention", "block");
  auto uncached = sbd::test::complete_model(shapes[2]);
  uncached.strings("sbd.decoders", {"dream", "llada", "ntp"})
      .u32("sbd.steps", 4)
      .text("sbd.schedule", "linear")
      .text("sbd.unmask", "top_n")
      .text("sbd.proxy", "entropy")
      .u32("sbd.top_n", 2)
      .u32("sbd.logit_shift", 1)
      .text("sbd.prompt_attention", "full")
      .text("sbd.commit_attention", "none");
  return {own, cached, uncached};
}

std::vector<Seed> built_in_seeds() {
  std::vector<Seed> seeds;
  for (const sbd::test::ModelShape& shape : sbd::test::complete_models()) {
    const std::string model = sbd::test::complete_model(shape).build();
    seeds.push_back({.image = model, .complete = true});
    const std::string adapter = sbd::test::complete_adapter(shape).build();
    seeds.push_back({.image = adapter, .complete = true, .model = model});
  }
  for (const sbd::test::GgufBuilder& model : decoded_otherwise()) {
    seeds.push_back({.image = model.build(), .complete = true});
  }
  sbd::test::GgufBuilder dense = sbd::test::tiny_model();  // most memory for its bytes
  dense.array("bytes", sbd::test::gguf_value::u8, 4000, std::string(4000, '\1'));
  for (int i = 0; i < 100; ++i) {
    dense.key(std::to_string(i), sbd::test::gguf_value::boolean, "\1");
    dense.tensor({std::to_string(i), {1}, sbd::test::gguf_tensor::f32, "data"});
  }
  seeds.push_back({.image = dense.build()});
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
      arguments.seeds.push_back({.image = std::string(std::istreambuf_iterator<char>(file), {})});
    }
  }
  for (Seed& seed : arguments.seeds) {
    fuzz::FieldFinder(seed).find();
    std::optional<fuzz::Claims> claims;
    std::string error = fuzz::read_stage(seed.image, seed.model, claims);
    if (error.empty() && seed.complete) {
      error = fuzz::load_stage(seed.image, seed.model);
    }
    if (!error.empty()) {
      throw std::runtime_error("a seed is not valid: " + error);
    }
  }
  return arguments;
}

struct Result {
  std::string problem;  // what must not be, or nothing
  std::string error;    // the line of an sbd::Error, or nothing
  bool read = false;
  double seconds = 0;
  std::size_t read_heap = 0;  // bytes, at most at any time
  std::size_t load_heap = 0;
  std::size_t mapped = 0;
};

// Runs a stage with at most `limit` bytes more from operator new; returns the most it took.
template <typename Stage>
std::size_t within(std::size_t limit, Stage stage) {
  const std::size_t before = memory::heap.live;
  memory::limit = before + limit;
  memory::heap.peak = before;
  try {
    stage();
  } catch (...) {
    memory::limit = SIZE_MAX;
    throw;
  }
  memory::limit = SIZE_MAX;
  return memory::heap.peak - before;
}

// model: of an adapter, the file that it is for.
Result run_case(const std::string& image, const std::string& model) {
  const std::size_t size = image.size() + model.size();
  Result result;
  std::optional<fuzz::Claims> claims;
  const std::size_t mapped_before = memory::mapped.live;
  memory::mapped.peak = mapped_before;
  ::alarm(kHangsAfter);
  const std::clock_t start = std::clock();  // the processor's: others may keep it from us
  try {
    result.read_heap = within(fuzz::read_heap(size),
                              [&] { result.error = fuzz::read_stage(image, model, claims); });
    result.read = result.error.empty();
    if (result.read) {
      result.load_heap = within(fuzz::load_heap(size, *claims),
                                [&] { result.error = fuzz::load_stage(image, model); });
    }
  } catch (const std::exception& other) {
    result.problem = other.what();
  }
  result.seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  ::alarm(0);

  result.mapped = memory::mapped.peak - mapped_before;
  if (result.error.find('\n') != std::string::npos) {
    result.problem = "an error of several lines: " + result.error;
  }
  if (result.seconds > 1) {
    result.problem = "slow: " + std::to_string(result.seconds) + " s";
  }
  if (memory::mapped.live != mapped_before) {
    result.problem = "memory is still mapped";
  }
  if (result.read && static_cast<double>(result.mapped) > fuzz::load_mapped(size, *claims)) {
    result.problem = "mapped " + std::to_string(result.mapped) + " bytes";
  }
  return result;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_on_error() { report_case(); }
#endif

int main(int argc, char** argv) {
  const Arguments arguments = read_arguments(argc, argv);
  const std::vector<Seed>& seeds = arguments.seeds;
  ::signal(SIGALRM, on_alarm);

  unsigned long long n_read = 0;
  unsigned long long n_generated = 0;
  unsigned long long n_failed = 0;
  Result most;
  std::set<std::string> outlines;
  for (std::uint64_t i = 0; i < arguments.iterations; ++i) {
    current_case = arguments.first + i;
    fuzz::Random random(arguments.seed, current_case);
    const Seed& seed = seeds[random.below(seeds.size())];
    std::string mutated = seed.image;
    for (std::size_t left = 1 + random.below(1 + random.below(4)); left > 0 && !mutated.empty();
         --left) {
      fuzz::mutate(random, seeds, seed, mutated);
    }
    mutated.shrink_to_fit();  // so that a byte past the end is one past the allocation

    const Result result = run_case(mutated, seed.model);
    if (!result.problem.empty()) {
      ++n_failed;
      report_case();
      std::fprintf(stderr, "%s (%zu bytes)\n", result.problem.c_str(), mutated.size());
    }
    n_read += result.read;
    n_generated += result.read && result.error.empty() && result.problem.empty();
    most.seconds = std::max(most.seconds, result.seconds);
    most.read_heap = std::max(most.read_heap, result.read_heap);
    most.load_heap = std::max(most.load_heap, result.load_heap);
    outlines.insert(outline(result.error));
    if (arguments.iterations == 1) {
      std::printf("%s\n", result.error.c_str());
    }
  }
  std::printf(
      "%llu cases: %llu read, %llu of them generated; %zu kinds of error line, %llu failed; "
      "slowest %.1f ms, most heap %zu KiB to read, %zu KiB to load and generate\n",
      static_cast<unsigned long long>(arguments.iterations), n_read, n_generated,
      outlines.size() - outlines.count(""), n_failed, most.seconds * 1e3, most.read_heap >> 10,
      most.load_heap >> 10);
  return n_failed == 0 ? 0 : 1;
}
