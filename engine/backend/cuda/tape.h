// Kernels to be launched, kept until the host needs a result. A forward of a shape seen before
// gives the same tape, kernel by kernel, whose graph is then replayed in one call; what differs
// between two such forwards (tokens, positions, caches) is in device memory, not in arguments.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "backend/cuda/runtime.h"

namespace sbd::cuda {

class Tape {
 public:
  template <typename Args>
  void add(void (*kernel)(Args), const Grid& grid, const Args& args) {
    static_assert(std::is_trivially_copyable_v<Launch<Args>>);
    const std::size_t at = bytes_.size();
    bytes_.resize(at + (sizeof(Launch<Args>) + 15) / 16 * 16);
    const Launch<Args> launch{kernel, grid, args};
    std::memcpy(bytes_.data() + at, &launch, sizeof launch);
    steps_.push_back({&Launch<Args>::run, &Launch<Args>::same, at});
  }

  bool empty() const { return steps_.empty(); }
  void clear() {
    steps_.clear();
    bytes_.clear();
  }
  void run(cudaStream_t stream, bool overlap) const {
    for (const Step& step : steps_) step.run(bytes_.data() + step.at, stream, overlap);
  }
  bool same(const Tape& other) const;

 private:
  template <typename Args>
  struct Launch {
    void (*kernel)(Args);
    Grid grid;
    Args args;

    static Launch load(const std::byte* bytes) {
      Launch launch;
      std::memcpy(static_cast<void*>(&launch), bytes, sizeof launch);
      return launch;
    }
    static void run(const std::byte* bytes, cudaStream_t stream, bool overlap) {
      const Launch l = load(bytes);
      launch(l.kernel, l.grid, l.args, stream, overlap);
    }
    static bool same(const std::byte* a, const std::byte* b) {
      const Launch x = load(a), y = load(b);
      return x.kernel == y.kernel && x.grid == y.grid && x.args == y.args;
    }
  };
  struct Step {
    void (*run)(const std::byte*, cudaStream_t, bool);
    bool (*same)(const std::byte*, const std::byte*);
    std::size_t at;
  };

  std::vector<Step> steps_;
  std::vector<std::byte> bytes_;
};

// Runs tapes: the first time a tape comes it is launched kernel by kernel, the second time it
// becomes a graph, from then on the graph is launched.
class GraphCache {
 public:
  GraphCache() = default;
  ~GraphCache() { clear(); }
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  void run(const Tape& tape, cudaStream_t stream, bool overlap);
  void clear();
  int n_replays() const { return n_replays_; }

 private:
  struct Known {
    Tape tape;
    cudaGraphExec_t graph;  // null: seen once
    long last_use;
  };
  std::vector<Known> known_;
  long now_ = 0;
  int n_replays_ = 0;
};

}  // namespace sbd::cuda
