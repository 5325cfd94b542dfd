// Whole generations through the engine, on either device: the same tokens.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "complete_model.h"
#include "cuda_check.h"
#include "engine.h"
#include "format/gguf.h"

namespace sbd {
namespace {

using namespace test;

struct Generated {
  std::vector<std::vector<TokenId>> texts;
  std::vector<std::vector<RowScores>> scores;  // of texts that ask for them
  int n_forwards = 0;
};

Generated generate(const std::string& path, const std::string& device,
                   const std::vector<Request>& requests) {
  Engine engine(path, {.device = device, .n_threads = 1, .kv_dtype = DType::f32});
  std::map<SequenceId, std::size_t> index;
  Generated generated;
  generated.texts.resize(requests.size());
  generated.scores.resize(requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) index[engine.add(requests[i])] = i;
  for (std::size_t finished = 0; finished < requests.size();) {
    ++generated.n_forwards;
    for (const SequenceEvents& events : engine.step()) {
      CHECK_EQ(events.error, std::string());
      auto& text = generated.texts[index.at(events.id)];
      for (const auto& one : events.events.scores) {
        generated.scores[index.at(events.id)].push_back(*one);
      }
      text.insert(text.end(), events.events.committed.begin(), events.events.committed.end());
      finished += events.events.finished || !events.error.empty();
    }
  }
  return generated;
}

void check_scores(const std::vector<RowScores>& got, const std::vector<RowScores>& expected) {
  CHECK_EQ(got.size(), expected.size());
  const auto check = [](const TokenScore& a, const TokenScore& b) {
    CHECK_EQ(a.token, b.token);
    CHECK_NEAR(a.logprob, b.logprob, 1e-4);
  };
  for (std::size_t i = 0; i < got.size(); ++i) {
    check(got[i].token, expected[i].token);
    CHECK_EQ(got[i].rank, expected[i].rank);
    CHECK_EQ(got[i].best.size(), expected[i].best.size());
    for (std::size_t j = 0; j < got[i].best.size(); ++j) {
      check(got[i].best[j], expected[i].best[j]);
    }
  }
}

TEST(cuda_generates_the_cpus_tokens) {
  using namespace gguf_tensor;
  constexpr unsigned kNewTokens = 12;
  int drawn = 0, same = 0;
  for (const ModelShape& shape : {ModelShape{"llama", 2, 32, 48, 4, 2, 8, 40, {f32}},
                                  ModelShape{"qwen2", 1, 20, 30, 2, 1, 6, 50, {f32}, true},
                                  ModelShape{"qwen3", 2, 32, 64, 2, 2, 16, 70, {f32}, true}}) {
    const MemoryFile file(complete_model(shape).build());
    std::vector<Request> requests;
    for (const char* decoder : {"ntp", "sbd", "sbd_lossless"}) {
      for (const float temperature : {0.0f, 0.9f}) {
        Request request;
        request.prompt = {1, 2, 3, static_cast<TokenId>(requests.size())};
        request.max_tokens = kNewTokens;
        request.decoder = decoder;
        request.temperature = temperature;
        // A size that is asked for is kept, whatever forwards cost.
        if (std::string_view(decoder) == "sbd_lossless") request.options = {{"block_size", 4}};
        if (temperature > 0) request.top_p = 0.9f;
        request.seed = 7;
        request.ignore_eos = true;
        requests.push_back(request);
        if (std::string_view(decoder) != "ntp") continue;
        request.logit_bias = {{3, 1.5f}, {5, -INFINITY}};
        request.presence_penalty = 0.5f;
        request.frequency_penalty = 0.25f;
        request.repetition_penalty = 1.3f;
        request.logprobs = 2;
        if (temperature > 0) request.min_p = 0.05f;
        requests.push_back(request);
      }
    }
    const Generated on_gpu = generate(file.path(), "cuda", requests);
    const Generated on_cpu = generate(file.path(), "cpu", requests);
    bool as_expected = true;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      CHECK_EQ(on_gpu.texts[i].size(), kNewTokens);
      CHECK_EQ(on_gpu.scores[i].size(), requests[i].logprobs ? kNewTokens : 0u);
      CHECK(std::ranges::find(on_gpu.texts[i], 5) == on_gpu.texts[i].end() ||
            requests[i].logit_bias.empty());
      if (on_gpu.texts[i] == on_cpu.texts[i]) check_scores(on_gpu.scores[i], on_cpu.scores[i]);
      if (requests[i].temperature > 0) {
        const bool equal = on_gpu.texts[i] == on_cpu.texts[i];
        as_expected = as_expected && equal;
        ++drawn;
        same += equal;
      } else {
        CHECK_EQ(on_gpu.texts[i], on_cpu.texts[i]);
      }
    }
    if (as_expected) CHECK_EQ(on_gpu.n_forwards, on_cpu.n_forwards);
    const auto score = [&](const char* device) {
      Engine engine(file.path(), {.device = device, .n_threads = 1, .kv_dtype = DType::f32});
      return engine.score({1, 2, 3, 4, 3, 2, 7, 7, 9}, 3);
    };
    check_scores(score("cuda"), score("cpu"));
  }
  cuda::check_draws(__FILE__, __LINE__, same, drawn, 0.5);  // texts, of 12 draws each
}

// Random weights are made on the device; forwards of several sequences are timed.
TEST(cuda_random_models_are_the_cpus) {
  const ModelShape shape{"qwen3", 2, 32, 64, 2, 2, 16, 70, {gguf_tensor::f32}, true};
  const MemoryFile file(complete_model(shape).build());
  const GgufFile gguf(file.path());
  const auto random = [&](const char* device) {
    return Engine(gguf.metadata(), DType::f32, true,
                  {.device = device, .n_threads = 1, .kv_dtype = DType::f32});
  };
  Engine gpu = random("cuda"), cpu = random("cpu");
  const auto got = gpu.forward({1, 2, 3, 4, 5}, 2), expected = cpu.forward({1, 2, 3, 4, 5}, 2);
  double largest = 0;
  for (const float x : expected) largest = std::max(largest, std::abs(static_cast<double>(x)));
  CHECK(largest > 0.01);
  CHECK_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) CHECK_NEAR(got[i], expected[i], 1e-4 * largest);
  for (Engine* engine : {&gpu, &cpu}) {
    const auto milliseconds = engine->time_forwards({1, 3}, 4, 2, 2);
    CHECK_EQ(milliseconds.size(), 2u);
    for (const auto& samples : milliseconds) {
      CHECK_EQ(samples.size(), 2u);
      CHECK(std::ranges::all_of(samples, [](double ms) { return ms > 0; }));
    }
    CHECK_THROWS_WITH(engine->time_forwards({1}, 4, 1, 0), "n_sequences must be at least 1, got 0");
  }
  CHECK(!gpu.profile_forward(3, 4).kernels.empty());
  CHECK_THROWS_WITH(cpu.profile_forward(3, 4),
                    "profile: expected a device that runs kernels (cuda), got cpu (");
}

TEST(cuda_devices_are_named_by_index) {
  const MemoryFile file(complete_model({"llama", 1, 8, 9, 1, 1, 4, 9, {gguf_tensor::f32}}).build());
  const auto open = [&](const char* device) {
    return Engine(file.path(), {.device = device}).device();
  };
  CHECK(open("cuda").starts_with("cuda:0 ("));
  CHECK(open("auto").starts_with("cuda:0 ("));
  CHECK(open("cpu").starts_with("cpu ("));
  CHECK_THROWS_WITH(open("cuda:64"), "device cuda:64: expected an index below the");
  for (const char* wrong : {"cuda:", "cuda:-1", "cuda:1x", "cuda0", "gpu"}) {
    CHECK_THROWS_WITH(open(wrong), "expected auto, cpu, cuda or cuda:N");
  }
}

}  // namespace
}  // namespace sbd
