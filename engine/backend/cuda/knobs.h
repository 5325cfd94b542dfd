// What the environment may change of how kernels are launched, so that one build makes all
// comparisons (benchmarks/cuda_quick.sh); docs/architecture.md says what for. Results are the same
// bits, but for `blocks`.
#pragma once

namespace sbd::cuda {

struct Knobs {
  bool graphs = true;
  bool overlap = true;
  int blocks = 2;
  int prefetch = 0;
  bool evict_first = false;
};

// An error of one line where a value is none.
Knobs read_knobs();

}  // namespace sbd::cuda
