// Settings from the environment change how kernels are launched, not what they compute.
#include <cstdlib>

#include "cuda_check.h"
#include "model/transformer.h"
#include "transformer_cases.h"

namespace sbd::cuda {
namespace {

using namespace test;

class Setting {
 public:
  Setting(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Setting() { unsetenv(name_); }

 private:
  const char* name_;
};

struct Computed {
  std::vector<float> logits;
  int n_graph_replays;
};

// A prompt, then a block three times: kernel by kernel, and as a graph.
Computed compute(DType dtype) {
  ModelConfig config = tiny_config("qwen3", dtype);
  config.num_hidden_layers = 1;
  config.hidden_size = 512;  // stages enough that some are left to prefetch
  config.vocab_size = 600;   // blocks enough that splits depend on their number
  MemoryTensors source(config, dtype, /*tied=*/false);
  CudaBackend backend(0);
  Transformer model(config, source, backend);
  KvCache kv = model.make_kv(60, DType::f16);
  Computed computed;
  const auto run = [&](const Segment& segment) {
    const auto logits = model.forward_logits({{{&kv, {{segment}}}}});
    computed.logits.insert(computed.logits.end(), logits.begin(), logits.end());
  };
  run(segment(random_tokens(3, 1)));
  for (int i = 0; i < 3; ++i) run(segment(random_tokens(9, 2), Attention::block, Kv::scratch));
  computed.n_graph_replays = backend.n_graph_replays();
  return computed;
}

TEST(cuda_knobs_change_no_bit) {
  for (const DType dtype : {DType::bf16, DType::q4_0, DType::q5_k}) {
    const Computed usual = compute(dtype);
    CHECK(usual.n_graph_replays > 0);
    for (const auto& [name, value] :
         std::vector<std::pair<const char*, const char*>>{{"SBD_CUDA_OVERLAP", "0"},
                                                          {"SBD_CUDA_GRAPHS", "0"},
                                                          {"SBD_CUDA_PREFETCH", "64"},
                                                          {"SBD_CUDA_EVICT_FIRST", "1"}}) {
      const Setting setting(name, value);
      const Computed changed = compute(dtype);
      CHECK_IN(std::string(name) + "=" + value,
               same_bits(changed.logits.data(), usual.logits.data(), usual.logits.size()));
      if (std::string_view(name) == "SBD_CUDA_GRAPHS") CHECK_EQ(changed.n_graph_replays, 0);
    }
    const Setting setting("SBD_CUDA_BLOCKS", "1");  // sums in another order on a small GPU
    const Computed changed = compute(dtype);
    double largest = 0, off = 0;
    for (std::size_t i = 0; i < usual.logits.size(); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(usual.logits[i])));
      off = std::max(off, std::abs(static_cast<double>(usual.logits[i]) - changed.logits[i]));
    }
    CHECK_IN(show(off / largest), (off > 0 || !kEmulated) && off < 0.02 * largest);
  }
}

TEST(cuda_knobs_that_are_none_are_one_line) {
  for (const auto& [name, value, expected] :
       std::vector<std::tuple<const char*, const char*, const char*>>{
           {"SBD_CUDA_OVERLAP", "2", "SBD_CUDA_OVERLAP=2: expected an integer from 0 to 1"},
           {"SBD_CUDA_PREFETCH", "x", "SBD_CUDA_PREFETCH=x: expected an integer from 0 to 64"},
           {"SBD_CUDA_BLOCKS", "", "SBD_CUDA_BLOCKS=: expected an integer from 1 to 16"},
           {"SBD_CUDA_EVICT_FIRST", "1 ", "expected an integer from 0 to 1"}}) {
    const Setting setting(name, value);
    CHECK_THROWS_WITH(CudaBackend(0), expected);
  }
}

}  // namespace
}  // namespace sbd::cuda
