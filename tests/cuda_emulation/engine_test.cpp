// An engine whose GPU fails, and what it says of itself.
#include "engine.h"
#include "backend/cuda/cuda_backend.h"
#include "child.h"
#include "complete_model.h"
#include "core/notice.h"
#include "format/gguf.h"
#include "reference.h"

namespace sbd::cuda {
namespace {

using namespace test;

Request request(TokenId first) {
  Request request;
  request.prompt = {first, 2, 3};
  request.max_tokens = 30;
  request.decoder = "ntp";
  request.ignore_eos = true;
  return request;
}

const char kLine[] =
    "an illegal memory access was encountered; what it held is lost: start the process again";

// A kernel fails after `good` others: all that decode are told, and nothing runs any more.
void lose_the_gpu(const std::string& path, long good) {
  Engine engine(path, {.device = "cuda"}), another(path, {.device = "cuda"});
  for (const TokenId token : {4, 5, 6}) engine.add(request(token));
  for (int i = 0; i < 5; ++i) {
    for (const SequenceEvents& each : engine.step()) CHECK_EQ(each.error, std::string());
  }
  emulation::options().good_launches = good;
  std::vector<SequenceEvents> events;
  do {
    events = engine.step();
  } while (!events.empty() && events[0].error.empty());
  CHECK_EQ(events.size(), 3u);
  std::string line;
  for (const SequenceEvents& each : events) {
    line = each.error;
    CHECK_EQ(each.error, events[0].error);
    CHECK(each.error_kind == ErrorKind::device);
  }
  CHECK(line.starts_with("the GPU failed at ") && line.ends_with(kLine));
  CHECK_EQ(line.find('\n'), std::string::npos);
  CHECK(engine.step().empty());
  for (Engine* each : {&engine, &another}) {
    each->add(request(1));
    events = each->step();
    CHECK_EQ(events.size(), 1u);
    CHECK_EQ(events[0].error, line);
  }
  CHECK_THROWS_WITH(engine.forward({1, 2}, 0), line);
  CHECK_THROWS_WITH(engine.time_forwards({1}, 2, 1, 1), line);
  CHECK_THROWS_WITH(engine.profile_forward(1, 2), line);
  CHECK_THROWS_WITH(engine.measure_peaks(), line);
  CHECK_THROWS_WITH(Engine(path, {.device = "cuda"}), line);
  CHECK(Engine(path, {.device = "auto", .n_threads = 1}).device().starts_with("cpu ("));
}

TEST(cuda_a_gpu_that_fails_ends_every_sequence) {
  const MemoryFile file(complete_model({"llama", 1, 8, 9, 1, 1, 4, 9, {gguf_tensor::f32}}).build());
  for (const long good : {0, 1, 5, 12, 30}) {
    CHECK_IN(std::to_string(good), in_child([&] { lose_the_gpu(file.path(), good); }).well());
  }
}

// The last kernels of a forward without outputs run when its sequence goes: what fails then is not
// lost from sight.
TEST(cuda_a_failure_while_memory_is_freed_is_seen) {
  const auto run = [] {
    CudaBackend backend(0);
    const auto weight = backend.random_weight(DType::f32, 8, 8, 1);
    {
      const auto kv = backend.allocate_kv(1, {1, 1, 8}, 16, DType::f16);
      const Buffer out = backend.allocate(8);
      const int zero = 0, one = 1;
      const SequenceRows sequence{kv.get(), 0, 1};
      backend.begin({{&zero, 1}, {&zero, 1}, {&one, 1}, {&sequence, 1}}, {}, false);
      backend.embed(*weight, nullptr, out.get());
      emulation::options().good_launches = 0;
    }
    CHECK_THROWS_WITH(backend.allocate(8), kLine);
  };
  CHECK(in_child(run).well());
}

TEST(cuda_auto_says_once_that_it_is_unproven) {
  const MemoryFile file(complete_model({"llama", 1, 8, 9, 1, 1, 4, 9, {gguf_tensor::f32}}).build());
  const auto said_by = [&](const char* device) {
    std::string said;
    const auto open = [&] {
      notices_given().clear();  // what other tests were told
      for (int i = 0; i < 2; ++i) Engine(file.path(), {.device = device});
    };
    CHECK(in_child(open, &said).well());
    return said;
  };
  CHECK_EQ(
      said_by("auto"),
      std::string("note: device auto takes the GPU, on which the CUDA backend is unproven: its "
                  "tests have passed in software only; device cpu does without\n"));
  CHECK_EQ(said_by("cuda"), std::string());
}

// 2.5 million values, of 3.4 bits each in the file; on the GPU matrices have whole blocks of 128
// rows.
TEST(cuda_says_what_types_become_that_it_does_not_read) {
  const auto said_by = [](std::uint32_t type) {
    const MemoryFile file(
        complete_model({"qwen3", 1, 256, 3072, 4, 1, 64, 9, {type}, true, false, true}).build());
    std::string said;
    CHECK(in_child([&] { Engine(file.path(), {.device = "cuda"}); }, &said).well());
    return said;
  };
  CHECK_EQ(
      said_by(gguf_tensor::q3_k),
      std::string("note: device cuda keeps weights of q3_k as f16: 2 MiB of the file are 5 MiB of "
                  "the GPU's memory\n"));
  for (const std::uint32_t type :
       {gguf_tensor::q4_0, gguf_tensor::q4_k, gguf_tensor::q5_k, gguf_tensor::q6_k}) {
    CHECK_EQ(said_by(type), std::string());
  }
}

}  // namespace
}  // namespace sbd::cuda
