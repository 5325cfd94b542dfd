#include "backend/cuda/tape.h"

#include <algorithm>

namespace sbd::cuda {

namespace {

// A graph of an 8B model is some 350 kernels, below a megabyte on either side. Sequences of
// different row counts and context lengths meet a few dozen shapes.
constexpr std::size_t kMaxGraphs = 64;

}  // namespace

Graph::Graph(const Tape& tape, cudaStream_t stream, bool overlap) {
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
  const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "making a graph");
}

void Tape::append(const Tape& other, std::size_t step) {
  Step copied = other.steps_[step];
  const auto from = other.bytes_.begin() + static_cast<std::ptrdiff_t>(copied.at);
  copied.at = bytes_.size();
  bytes_.insert(bytes_.end(), from, from + static_cast<std::ptrdiff_t>(copied.n_bytes));
  steps_.push_back(copied);
}

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
    if (known_.size() == kMaxGraphs) {
      known_.erase(std::ranges::min_element(known_, {}, &Known::last_use));
    }
    known_.push_back({tape, nullptr, now_});
    return;
  }
  found->last_use = now_;
  if (found->graph == nullptr) {
    try {
      found->graph = std::make_unique<Graph>(tape, stream, overlap);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::memory) throw;
      return tape.run(stream, overlap);  // it does without
    }
  }
  found->graph->launch(stream);
  ++n_replays_;
}

}  // namespace sbd::cuda
