// CudaBackend: where the time of a forward goes. Its kernels are kept as they come, and then run
// again alone and as graphs: they read the same numbers, and write the same cache.
#include <algorithm>
#include <string>

#include "backend/cuda/cuda_backend.h"

namespace sbd::cuda {

namespace {

constexpr int kTries = 5;     // whose median counts
constexpr int kLaunches = 3;  // of a graph, one behind the other, so that launching does not show

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

// Of each kernel alone, microseconds.
std::vector<double> kernel_times(const Tape& tape, cudaStream_t stream) {
  std::vector<Event> events(tape.size() + 1);
  std::vector<std::vector<double>> us(tape.size());
  for (int i = 0; i < kTries; ++i) {
    events[0].record(stream);
    for (std::size_t step = 0; step < tape.size(); ++step) {
      tape.run_step(step, stream, /*overlap=*/false);
      events[step + 1].record(stream);
    }
    for (std::size_t step = 0; step < tape.size(); ++step) {
      us[step].push_back(microseconds(events[step], events[step + 1]));
    }
  }
  std::vector<double> medians;
  for (auto& tries : us) medians.push_back(median(std::move(tries)));
  return medians;
}

double graph_time(const Tape& tape, cudaStream_t stream, bool overlap) {
  const Graph graph(tape, stream, overlap);
  Event begin, end;
  std::vector<double> us;
  graph.launch(stream);
  for (int i = 0; i < kTries; ++i) {
    begin.record(stream);
    for (int j = 0; j < kLaunches; ++j) graph.launch(stream);
    end.record(stream);
    us.push_back(microseconds(begin, end) / kLaunches);
  }
  return median(std::move(us));
}

std::string full_name(const Work& work) {
  return work.is_matmul() ? format("{} {} -> {}", work.name, work.cols, work.features)
                          : std::string(work.name);
}

}  // namespace

ForwardProfile CudaBackend::profile(const std::function<void()>& forward) {
  forward();  // grows what it needs
  finish();
  Tape tape;
  recorded_ = &tape;
  try {
    forward();
    finish();
  } catch (...) {
    recorded_ = nullptr;
    throw;
  }
  recorded_ = nullptr;

  ForwardProfile profile{};
  Tape matmuls;
  const std::vector<double> us = kernel_times(tape, stream_);
  for (std::size_t step = 0; step < tape.size(); ++step) {
    const Work& work = tape.work(step);
    if (work.is_matmul()) matmuls.append(tape, step);
    const std::string name = full_name(work);
    auto found = std::ranges::find(profile.kernels, name, &KernelTime::name);
    if (found == profile.kernels.end()) {
      profile.kernels.push_back({name, 0, 0, 0});
      found = profile.kernels.end() - 1;
    }
    ++found->calls;
    found->us += us[step];
    found->bytes += work.bytes;
  }
  profile.graph_us = graph_time(tape, stream_, overlap_);
  profile.in_turn_us = graph_time(tape, stream_, false);
  profile.matmuls_us = graph_time(matmuls, stream_, overlap_);
  return profile;
}

}  // namespace sbd::cuda
