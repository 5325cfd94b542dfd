// Whole loads: complete models generate, and a damaged one is refused with the line that says what
// is wrong with it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/cuda/cuda.h"
#include "check.h"
#include "complete_model.h"
#include "engine.h"
#include "format/gguf.h"
#include "reference.h"

namespace sbd {
namespace {

using namespace test;

constexpr int kLlama = 0, kQwen2 = 1, kPlain = 3;  // in complete_models()

GgufBuilder model(int index) {
  return complete_model(complete_models()[static_cast<std::size_t>(index)]);
}

Engine load(const GgufBuilder& builder, EngineOptions options = {}) {
  const MemoryFile file(builder.build());
  options.n_threads = 1;
  return Engine(file.path(), options);
}

GgufTensor& tensor(GgufBuilder& builder, const std::string& name) {
  return *std::ranges::find(builder.tensors, name, &GgufTensor::name);
}

// With `name`, a key of 32 bits, set to `number`.
GgufBuilder with_key(GgufBuilder builder, const std::string& name, std::uint32_t number) {
  std::erase_if(builder.key_values,
                [&](const std::string& entry) { return entry.starts_with(gguf_string(name)); });
  return builder.u32(name, number);
}

std::string shape_text(const GgufTensor& tensor) {
  std::string text;
  for (const std::uint64_t size : tensor.dimensions) {
    text = std::to_string(size) + (text.empty() ? "" : ", " + text);
  }
  return "[" + text + "]";
}

std::vector<TokenId> generate(Engine& engine, const Request& request) {
  engine.add(request);
  std::vector<TokenId> tokens;
  for (bool finished = false; !finished;) {
    for (const SequenceEvents& sequence : engine.step()) {
      if (!sequence.error.empty()) throw Error(ErrorKind::value, sequence.error);
      const Events& events = sequence.events;
      tokens.insert(tokens.end(), events.committed.begin(), events.committed.end());
      finished = events.finished.has_value();
    }
  }
  return tokens;
}

Request request_of(int max_tokens) {
  Request request;
  request.prompt = {0, 1};
  request.max_tokens = max_tokens;
  request.ignore_eos = true;
  return request;
}

// Makes the tensor's last value, or the scale of its last group, NaN or infinite.
void spoil_end(GgufTensor& tensor, bool nan) {
  const auto put = [&](std::size_t from_end, const std::string& bytes) {
    tensor.data.replace(tensor.data.size() - from_end, bytes.size(), bytes);
  };
  const std::string half = bytes_of(static_cast<std::uint16_t>(nan ? 0x7e01 : 0xfc00));
  const float infinity = std::numeric_limits<float>::infinity();
  switch (tensor.type) {
    case gguf_tensor::f32: put(4, bytes_of(nan ? -std::nanf("") : infinity)); break;
    case gguf_tensor::f16: put(2, half); break;
    case gguf_tensor::bf16:
      put(2, bytes_of(static_cast<std::uint16_t>(nan ? 0xffc0 : 0x7f80)));
      break;
    default: {  // the scale; the minimum where there is one
      const DType type = *find_tensor_type(tensor.type)->dtype;
      const auto places = halves_of(type);
      put(bytes_per_block(type) - (nan ? places.front() : places.back()), half);
    }
  }
}

TEST(load_complete_models_generate) {
  for (const ModelShape& shape : complete_models()) {
    Engine engine = load(complete_model(shape));
    CHECK_EQ(engine.config().architecture, shape.architecture);
    CHECK_EQ(engine.auto_decoder(), shape.sbd ? "sbd" : "ntp");
    for (const char* decoder : {"ntp", "sbd"}) {
      Request request = request_of(9);
      request.decoder = decoder;
      if (!shape.sbd && request.decoder == "sbd") {
        CHECK_THROWS_WITH(engine.add(request), "needs a mask token and the model file names none");
        continue;
      }
      const std::vector<TokenId> tokens = generate(engine, request);
      CHECK_EQ(tokens.size(), 9);
      for (const TokenId token : tokens) {
        CHECK(token >= 0 && token < static_cast<int>(shape.vocab));
        CHECK(token != engine.config().mask_token_id);
      }
    }
  }
}

TEST(load_names_a_missing_tensor) {
  for (const ModelShape& shape : complete_models()) {
    const GgufBuilder whole = complete_model(shape);
    for (const GgufTensor& each : whole.tensors) {
      GgufBuilder builder = whole;
      std::erase_if(builder.tensors, [&](const GgufTensor& t) { return t.name == each.name; });
      if (each.name == "output.weight" || each.name == "rope_freqs.weight" ||
          each.name.ends_with("attn_output.bias")) {
        load(builder);  // a tied head; no scaling; no bias
      } else {
        CHECK_THROWS_WITH(load(builder), "tensor " + each.name + " is missing; convert");
      }
    }
  }
}

TEST(load_names_a_misshapen_tensor) {
  for (const ModelShape& shape : complete_models()) {
    const GgufBuilder whole = complete_model(shape);
    for (std::size_t i = 0; i < whole.tensors.size(); ++i) {
      const std::string expected = shape_text(whole.tensors[i]);
      const auto check = [&](std::vector<std::uint64_t> dimensions) {
        GgufBuilder builder = whole;
        GgufTensor& changed = builder.tensors[i];
        changed = filled_tensor(changed.name, std::move(dimensions), changed.type);
        CHECK_THROWS_WITH(load(builder), "tensor " + changed.name + ": expected shape " + expected +
                                             " by the metadata, got " + shape_text(changed));
      };
      std::vector<std::uint64_t> dimensions = whole.tensors[i].dimensions;
      dimensions.push_back(1);
      check(dimensions);  // another rank
      dimensions.pop_back();
      dimensions.back() += 1;
      check(dimensions);  // a row too many
      dimensions.back() -= 1;
      std::ranges::reverse(dimensions);
      if (dimensions != whole.tensors[i].dimensions && whole.tensors[i].type <= gguf_tensor::f16) {
        check(dimensions);  // transposed: as many bytes
      }
    }
  }
}

TEST(load_names_the_tensor_that_metadata_disagree_with) {
  const auto refused = [](int index, const std::string& key, std::uint32_t number,
                          const std::string& line) {
    const std::string prefix = complete_models()[static_cast<std::size_t>(index)].architecture;
    CHECK_THROWS_WITH(load(with_key(model(index), prefix + "." + key, number)), line);
  };
  const std::string q = "tensor blk.0.attn_q.weight: expected shape ";
  refused(kLlama, "attention.head_count", 4, q + "[64, 32] by the metadata, got [32, 32]");
  refused(kLlama, "attention.key_length", 8, q + "[16, 32] by the metadata, got [32, 32]");
  refused(kLlama, "attention.head_count_kv", 2,
          "tensor blk.0.attn_k.weight: expected shape [32, 32] by the metadata, got [16, 32]");
  refused(kLlama, "embedding_length", 64,
          "tensor token_embd.weight: expected shape [8, 64] by the metadata, got [8, 32]");
  refused(kLlama, "feed_forward_length", 33,
          "tensor blk.0.ffn_gate.weight: expected shape [33, 32] by the metadata, got [32, 32]");
  refused(kLlama, "vocab_size", 9,
          "tensor token_embd.weight: expected shape [9, 32] by the metadata, got [8, 32]");
  refused(kLlama, "block_count", 2, "tensor blk.1.attn_norm.weight is missing");
  refused(kQwen2, "block_count", 1,
          "tensor 'blk.1.attn_norm.weight' belongs to an architecture this engine does not "
          "compute");

  // The tokenizer's tokens are the vocabulary where no key gives its size.
  GgufBuilder builder = model(kPlain);
  std::erase_if(builder.key_values, [](const std::string& entry) {
    return entry.starts_with(gguf_string("llama.vocab_size"));
  });
  builder.strings("tokenizer.ggml.tokens", std::vector<std::string>(10, "a"));
  CHECK_THROWS_WITH(load(builder),
                    "tensor token_embd.weight: expected shape [10, 8] by the "
                    "metadata, got [9, 8]");
}

// Some pad the embedding and not the tokenizer.
TEST(load_without_a_vocabulary_size_takes_the_embedding_s) {
  GgufBuilder builder = model(kPlain);
  std::erase_if(builder.key_values, [](const std::string& entry) {
    return entry.starts_with(gguf_string("llama.vocab_size"));
  });
  CHECK_EQ(load(builder).config().vocab_size, 9);
  builder.strings("tokenizer.ggml.tokens", std::vector<std::string>(7, "a"));
  Engine engine = load(builder);
  CHECK_EQ(engine.config().vocab_size, 9);
  CHECK_EQ(engine.forward({8}, 0).size(), 9);
}

TEST(load_refuses_a_tensor_nothing_asked_for) {
  for (const std::string name : {"blk.0.attn_sinks.weight", "blk.1.attn_q.weight", "x\ny"}) {
    GgufBuilder builder = model(kLlama);
    builder.tensor(filled_tensor(name, {4}, gguf_tensor::f32));
    std::string shown = name == "x\ny" ? "x\\x0ay" : name;
    CHECK_THROWS_WITH(load(builder), "tensor '" + shown + "' belongs to an architecture");
  }
}

TEST(load_names_a_tensor_with_nan_or_infinity) {
  for (const ModelShape& shape : complete_models()) {
    const GgufBuilder whole = complete_model(shape);
    for (std::size_t i = 0; i < whole.tensors.size(); ++i) {
      for (const bool nan : {true, false}) {
        GgufBuilder builder = whole;
        GgufTensor& spoilt = builder.tensors[i];
        spoil_end(spoilt, nan);
        const std::string row = spoilt.dimensions.size() == 1
                                    ? ""
                                    : ": row " + std::to_string(spoilt.dimensions.back() - 1);
        CHECK_THROWS_WITH(load(builder), "tensor " + spoilt.name + row + " holds NaN or infinity");
      }
    }
  }
}

// Norms and biases in F16 or BF16 give what their values in F32 do.
TEST(load_vectors_of_every_float_type) {
  const auto logits = [](std::uint32_t type, bool widened) {
    GgufBuilder builder = model(kQwen2);
    for (GgufTensor& tensor : builder.tensors) {
      if (tensor.dimensions.size() > 1) continue;
      tensor = filled_tensor(tensor.name, tensor.dimensions, type);
      if (!widened) continue;
      std::string wide;
      for (std::size_t i = 0; i < tensor.data.size(); i += 2) {
        std::uint16_t bits;
        std::memcpy(&bits, tensor.data.data() + i, 2);
        wide += bytes_of(type == gguf_tensor::f16 ? half_to_float(bits) : bf16_to_float(bits));
      }
      tensor.type = gguf_tensor::f32;
      tensor.data = wide;
    }
    return load(builder).forward({0, 1, 2}, 0);
  };
  for (const std::uint32_t type : {gguf_tensor::f16, gguf_tensor::bf16}) {
    CHECK_EQ(logits(type, false), logits(type, true));
  }
  CHECK(logits(gguf_tensor::f16, false) != logits(gguf_tensor::bf16, false));
}

TEST(load_refuses_a_vector_of_another_type) {
  GgufBuilder builder = model(kLlama);
  GgufTensor& norm = tensor(builder, "output_norm.weight");
  norm = filled_tensor(norm.name, norm.dimensions, gguf_tensor::q8_0);
  CHECK_THROWS_WITH(load(builder),
                    "tensor output_norm.weight: expected type f32, f16 or bf16, got q8_0");
}

TEST(load_refuses_types_that_cannot_run) {
  GgufBuilder builder = model(kLlama);
  builder.tensor({"later", {256}, 16, std::string(66, '\0')});
  CHECK_THROWS_WITH(load(builder), "tensor 'later': type IQ2_XXS cannot run here, expected F32");
}

TEST(load_refuses_a_part_of_a_model) {
  CHECK_THROWS_WITH(load(with_key(model(kPlain), "split.count", 3)),
                    "key 'split.count' is 3, expected a whole model; join the parts with: "
                    "llama-gguf-split --merge");
  load(with_key(model(kPlain), "split.count", 1));
}

TEST(load_refuses_rope_divisors_that_are_not_positive) {
  for (const float divisor : {0.0f, -1.0f}) {
    GgufBuilder builder = model(kLlama);
    tensor(builder, "rope_freqs.weight").data.replace(8, 4, bytes_of(divisor));
    CHECK_THROWS_WITH(
        load(builder),
        format("tensor rope_freqs.weight holds {}, expected numbers above 0", divisor));
  }
}

TEST(load_on_a_device) {
  const auto device = [](const char* name) {
    EngineOptions options;
    options.device = name;
    return load(model(kLlama), options).device();
  };
  CHECK(device("cpu").starts_with("cpu ("));
  CHECK_THROWS_WITH(device("gpu"), "`device` \"gpu\": expected auto, cpu, cuda or cuda:N");
  const std::string why = cuda::why_unavailable();
  if (why.empty()) {  // a GPU: tests/cuda has more
    CHECK(device("auto").starts_with("cuda:0 ("));
    return;
  }
  CHECK(device("auto").starts_with("cpu ("));
  CHECK(why.starts_with("device cuda: ") && why.ends_with("use device cpu"));
  CHECK(why.find('\n') == std::string::npos);
  CHECK_THROWS_WITH(device("cuda"), why);
  CHECK_THROWS_WITH(device("cuda:1"), why);
}

TEST(load_bounds_the_context) {
  CHECK_EQ(load(model(kLlama)).n_ctx(), 64);
  CHECK_EQ(load(model(kLlama), {.n_ctx = 64}).n_ctx(), 64);
  CHECK_THROWS_WITH(load(model(kLlama), {.n_ctx = 65}),
                    "`n_ctx` must be between 1 and the model's 64, got 65");
  CHECK_THROWS_WITH(load(model(kLlama), {.n_ctx = -1}), "between 1 and the model's 64, got -1");

  const GgufBuilder windowed = with_key(model(kPlain), "llama.attention.sliding_window", 24);
  CHECK_EQ(load(windowed).n_ctx(), 24);
  CHECK_EQ(load(windowed, {.n_ctx = 24}).n_ctx(), 24);
  CHECK_THROWS_WITH(load(windowed, {.n_ctx = 25}),
                    "`n_ctx` 25 is beyond the model's sliding window of 24");
  Engine engine = load(windowed);
  Request request = request_of(100);
  request.prompt.assign(24, 0);
  CHECK_THROWS_WITH(engine.add(request),
                    "shorter than the context of 24 tokens, got 24 tokens: shorten it: this engine "
                    "computes no more than the model's sliding window of 24");
  Engine smaller = load(windowed, {.n_ctx = 20});
  const std::string mend = ": shorten it or raise `n_ctx` (the model takes 24)";
  CHECK_THROWS_WITH(smaller.add(request), "context of 20 tokens, got 24 tokens" + mend);
  CHECK_THROWS_WITH(smaller.forward(request.prompt, 0), "context of 20, got 24" + mend);
  CHECK_EQ(how_to_fit(24, 24, 0), "shorten it");
  request.prompt.assign(20, 0);
  CHECK_EQ(generate(engine, request).size(), 4);
}

// The file cannot choose work that it is too small to justify.
TEST(load_bounds_what_a_small_file_asks_for) {
  const auto with_context = [](std::uint32_t context, std::uint32_t block_size) {
    return with_key(with_key(model(kLlama), "llama.context_length", context), "sbd.block_size",
                    block_size);
  };
  CHECK_EQ(load(with_context(1 << 27, 1024)).defaults().block.block_size.value(), 1024);
  CHECK_EQ(load(with_context(1 << 27, 1024), {.n_ctx = 10}).defaults().block.block_size.value(),
           10);
  CHECK_THROWS_WITH(load(with_context(1 << 27, 1025)),
                    "'sbd.block_size' is 1025, expected 1 to 1024");

  std::vector<std::int32_t> ids(300);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
  const GgufBuilder many =
      with_key(model(kLlama), "llama.vocab_size", 400).i32s("sbd.eos_token_ids", ids);
  CHECK_THROWS_WITH(load(many), "key 'sbd.eos_token_ids' has more than 256 token ids");
}

// Finite weights whose logits all lie below the value that stands for an excluded token, or beyond
// float32: there is no token to choose.
TEST(load_logits_without_a_token_to_choose_are_an_error) {
  int refused = 0;
  for (const float weight : {-1e34f, 1e34f}) {
    GgufBuilder builder = with_key(model(kPlain), "sbd.mask_token_id", 0);
    GgufTensor& head = tensor(builder, "output.weight");
    for (std::size_t i = 0; i < head.data.size(); i += 4) head.data.replace(i, 4, bytes_of(weight));
    Engine engine = load(builder);
    for (const char* decoder : {"ntp", "sbd"}) {
      Request request = request_of(1);
      request.decoder = decoder;
      try {
        CHECK(generate(engine, request) != std::vector<TokenId>{0});  // the mask token
      } catch (const Error& error) {
        ++refused;
        CHECK(std::string(error.what()).starts_with("the model computed logits that are NaN"));
      }
    }
  }
  CHECK(refused >= 1);
}

}  // namespace
}  // namespace sbd
