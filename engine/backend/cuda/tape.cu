#include "backend/cuda/tape.h"

#include <algorithm>

namespace sbd::cuda {

namespace {

// A graph of an 8B model is some 350 kernels, below a megabyte on either side. Sequences of
// different row counts and context lengths meet a few dozen shapes.
constexpr std::size_t kMostGraphs = 64;

cudaGraphExec_t capture(const Tape& tape, cudaStream_t stream, bool overlap) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a graph");
  try {
    tape.run(stream, overlap);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "capturing a graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "making a graph");
  return executable;
}

}  // namespace

bool Tape::same(const Tape& other) const {
  if (steps_.size() != other.steps_.size()) return false;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& a = steps_[i];
    const Step& b = other.steps_[i];
    if (a.run != b.run || a.at != b.at) return false;
    if (!a.same(bytes_.data() + a.at, other.bytes_.data() + b.at)) return false;
  }
  return true;
}

void GraphCache::run(const Tape& tape, cudaStream_t stream, bool overlap) {
  ++now_;
  const auto found =
      std::ranges::find_if(known_, [&](const Known& known) { return known.tape.same(tape); });
  if (found == known_.end()) {
    tape.run(stream, overlap);
    if (known_.size() == kMostGraphs) {
      const auto oldest = std::ranges::min_element(known_, {}, &Known::last_use);
      // A launch under way keeps what it needs of the graph it is of.
      if (oldest->graph != nullptr) cudaGraphExecDestroy(oldest->graph);
      known_.erase(oldest);
    }
    known_.push_back({tape, nullptr, now_});
    return;
  }
  found->last_use = now_;
  if (found->graph == nullptr) found->graph = capture(tape, stream, overlap);
  check(cudaGraphLaunch(found->graph, stream), "launching a graph");
  ++n_replays_;
}

void GraphCache::clear() {
  for (const Known& known : known_) {
    if (known.graph != nullptr) cudaGraphExecDestroy(known.graph);
  }
  known_.clear();
}

}  // namespace sbd::cuda
