// Whole generations through the engine, on either device: the same tokens.
#include "check.h"
#include "complete_model.h"
#include "engine.h"

namespace sbd {
namespace {

using namespace test;

struct Generated {
  std::vector<std::vector<TokenId>> texts;
  int n_forwards = 0;
};

Generated generate(const std::string& path, const std::string& device,
                   const std::vector<Request>& requests) {
  Engine engine(path, {.device = device, .n_threads = 1, .kv_dtype = DType::f32});
  std::map<SequenceId, std::size_t> index;
  Generated generated;
  generated.texts.resize(requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) index[engine.add(requests[i])] = i;
  for (std::size_t finished = 0; finished < requests.size();) {
    ++generated.n_forwards;
    for (const SequenceEvents& events : engine.step()) {
      CHECK_EQ(events.error, std::string());
      auto& text = generated.texts[index.at(events.id)];
      text.insert(text.end(), events.events.committed.begin(), events.events.committed.end());
      finished += events.events.finished || !events.error.empty();
    }
  }
  return generated;
}

TEST(cuda_generates_the_cpus_tokens) {
  using namespace gguf_tensor;
  for (const ModelShape& shape : {ModelShape{"llama", 2, 32, 48, 4, 2, 8, 40, {f32}},
                                  ModelShape{"qwen2", 1, 20, 30, 2, 1, 6, 50, {f32}, true},
                                  ModelShape{"qwen3", 2, 32, 64, 2, 2, 16, 70, {f32}, true}}) {
    const MemoryFile file(complete_model(shape).build());
    std::vector<Request> requests;
    for (const char* decoder : {"ntp", "sbd", "sbd_lossless"}) {
      for (const float temperature : {0.0f, 0.9f}) {
        if (temperature > 0 && std::string_view(decoder) == "sbd_lossless") continue;
        Request request;
        request.prompt = {1, 2, 3, static_cast<TokenId>(requests.size())};
        request.max_tokens = 20;
        request.decoder = decoder;
        request.temperature = temperature;
        request.top_p = 0.9f;
        request.seed = 7;
        request.ignore_eos = true;
        requests.push_back(request);
      }
    }
    const Generated on_gpu = generate(file.path(), "cuda", requests);
    const Generated on_cpu = generate(file.path(), "cpu", requests);
    CHECK_EQ(on_gpu.n_forwards, on_cpu.n_forwards);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      CHECK_EQ(on_gpu.texts[i].size(), 20u);
      CHECK_EQ(on_gpu.texts[i], on_cpu.texts[i]);
    }
  }
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
