// Kernels to be launched, kept until the host needs a result. A forward of a shape seen before
// gives the same tape, kernel by kernel, whose graph is then replayed in one call; what differs
// between two such forwards (tokens, positions, caches) is in device memory, not in arguments.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <string_view>
#include <type_traits>
#include <vector>

#include "backend/cuda/runtime.h"

namespace sbd::cuda {

// What a kernel does, for profiles.
struct Work {
  std::string_view name;  // of a matmul: its weights' type
  double bytes = 0;       // it reads; 0: not counted
  int cols = 0;           // of a matmul
  int features = 0;       // likewise
  bool is_matmul() const { return features > 0; }
};

class Tape {
 public:
  template <typename Args>
  void add(const Work& work, void (*kernel)(Args), const Grid& grid, const Args& args) {
    static_assert(std::is_trivially_copyable_v<Launch<Args>>);
    const std::size_t at = bytes_.size();
    bytes_.resize(at + (sizeof(Launch<Args>) + 15) / 16 * 16);
    const Launch<Args> launch{kernel, grid, args};
    std::memcpy(bytes_.data() + at, &launch, sizeof launch);
    steps_.push_back({&Launch<Args>::run, &Launch<Args>::same, at, bytes_.size() - at, work});
  }
  // A step of another tape, or all of them.
  void append(const Tape& other, std::size_t step);
  void append(const Tape& other) {
    for (std::size_t step = 0; step < other.size(); ++step) append(other, step);
  }

  bool empty() const { return steps_.empty(); }
  std::size_t size() const { return steps_.size(); }
  const Work& work(std::size_t step) const { return steps_[step].work; }
  void clear() {
    steps_.clear();
    bytes_.clear();
  }
  void run(cudaStream_t stream, bool overlap) const {
    for (std::size_t step = 0; step < size(); ++step) run_step(step, stream, overlap);
  }
  void run_step(std::size_t step, cudaStream_t stream, bool overlap) const {
    steps_[step].run(bytes_.data() + steps_[step].at, stream, overlap);
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
    std::size_t at, n_bytes;
    Work work;
  };

  std::vector<Step> steps_;
  std::vector<std::byte> bytes_;
};

// A tape's kernels, launched in one call.
class Graph {
 public:
  Graph(const Tape& tape, cudaStream_t stream, bool overlap);
  ~Graph() { cudaGraphExecDestroy(executable_); }  // a launch under way keeps what it needs
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(cudaStream_t stream) const {
    check(cudaGraphLaunch(executable_, stream), "launching a graph");
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// Runs tapes: the first time a tape comes it is launched kernel by kernel, the second time it
// becomes a graph, from then on the graph is launched.
class GraphCache {
 public:
  void run(const Tape& tape, cudaStream_t stream, bool overlap);
  void clear() { known_.clear(); }
  int n_replays() const { return n_replays_; }

 private:
  struct Known {
    Tape tape;
    std::unique_ptr<Graph> graph;  // null: seen once
    long last_use;
  };
  std::vector<Known> known_;
  long now_ = 0;
  int n_replays_ = 0;
};

}  // namespace sbd::cuda
