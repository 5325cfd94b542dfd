// CudaBackend: the LM head. The logits of 64 rows at a time go through memory: 4 bytes a token and
// row, where its weights are 2 bytes or less times hidden_size, so a fused reduction would save
// less than 2 % of the head's time at 32 rows of an 8B model.
#include <algorithm>
#include <cmath>

#include "backend/cuda/cuda_backend.h"

namespace sbd::cuda {

namespace {

constexpr std::size_t kHeadRows = 64;

}  // namespace

// A block's wanted rows are any number of its rows, and become fewer: so that one graph of the
// layers serves them all, the head's few kernels are not in it.
void CudaBackend::end_of_layers() {
  use_device();
  flush();
  keep_graph_ = false;
}

const float* CudaBackend::head(const Input& input, const Weight& head,
                               std::span<const OutputRow> outputs) {
  std::vector<int> rows;
  for (const OutputRow& output : outputs) rows.push_back(output.row);
  const int n = static_cast<int>(outputs.size());
  auto* logits = grown<float>(logits_, outputs.size() * static_cast<std::size_t>(head.rows()));
  const Linear linear{&head, nullptr, logits};
  const int* source_rows = metadata_.add(std::span<const int>(rows));
  multiply(prepare(input, {&linear, 1}, n, source_rows), {&linear, 1}, n, /*accumulate=*/false);
  return logits;
}

void CudaBackend::head_stats(const Input& input, const Weight& head,
                             std::span<const OutputRow> outputs, TokenId mask_token,
                             std::span<RowStats> stats) {
  end_of_layers();
  if (host_stats_.size() < stats.size_bytes()) host_stats_ = PinnedMemory(stats.size_bytes());
  auto* device_stats = grown<RowStats>(head_stats_, stats.size());
  for (std::size_t first = 0; first < outputs.size(); first += kHeadRows) {
    const auto part = outputs.subspan(first, std::min(kHeadRows, outputs.size() - first));
    std::vector<HeadRow> rows;
    bool sampled = false;
    for (const OutputRow& output : part) {
      rows.push_back({output.position, output.sampling});
      sampled = sampled || output.sampling.temperature > 0;
    }
    HeadArgs args{};
    args.logits = this->head(input, head, part);
    args.rows = metadata_.add(std::span<const HeadRow>(rows));
    const auto n_runs = static_cast<std::size_t>(head_runs(head.rows()));
    args.runs = grown<RunStats>(head_runs_, part.size() * n_runs);
    args.highest = grown<float>(head_highest_, part.size());
    args.stats = device_stats + first;
    args.vocab = head.rows();
    args.mask_token = mask_token;
    cuda::head_stats(tape_, args, static_cast<int>(part.size()), sampled);
  }
  flush();
  check(cudaMemcpyAsync(host_stats_.data(), device_stats, stats.size_bytes(),
                        cudaMemcpyDeviceToHost, stream_),
        "fetching a forward's statistics");
  check(cudaStreamSynchronize(stream_), "computing a forward");
  std::memcpy(stats.data(), host_stats_.data(), stats.size_bytes());
  for (const RowStats& row : stats) {
    SBD_CHECK(!std::isnan(row.entropy),
              "the model computed logits that are NaN or infinite: its weights are damaged, or its "
              "values exceed an F16 KV cache (then kv_dtype f32 helps)");
  }
}

void CudaBackend::head_logits(const Input& input, const Weight& head,
                              std::span<const OutputRow> outputs, float* logits) {
  end_of_layers();
  for (std::size_t first = 0; first < outputs.size(); first += kHeadRows) {
    const auto part = outputs.subspan(first, std::min(kHeadRows, outputs.size() - first));
    const float* computed = this->head(input, head, part);
    const std::size_t n = part.size() * static_cast<std::size_t>(head.rows());
    flush();
    check(cudaMemcpyAsync(logits, computed, n * sizeof(float), cudaMemcpyDeviceToHost, stream_),
          "fetching logits");
    check(cudaStreamSynchronize(stream_), "computing a forward");
    logits += n;
  }
}

}  // namespace sbd::cuda
