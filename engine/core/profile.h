// Where a forward's time goes on a device.
#pragma once

#include <string>
#include <vector>

namespace sbd {

struct KernelTime {
  std::string name;  // of a matmul: type, inputs and outputs
  int calls;
  double us;     // of all calls, each alone
  double bytes;  // of weights, cache or activations that they read; 0: not counted
};

struct ForwardProfile {
  std::vector<KernelTime> kernels;  // in the order in which they come
  double graph_us;                  // the forward as it runs, all of it in one graph
  double in_turn_us;                // the same, no kernel starting before the end of the last
  double matmuls_us;                // a graph of the matmuls alone
};

}  // namespace sbd
