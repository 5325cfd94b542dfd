// CudaBackend: the LM head. Its matmul leaves the statistics of runs of 128 logits, 24 bytes of
// each; logits themselves go to memory only where they are asked for, or are to be drawn from.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/run_stats.h"

namespace sbd::cuda {

namespace {

// Of logits that are in memory at once: 260 rows of 128,000 tokens, each read of the weights for as
// many rows as may share it.
constexpr std::size_t kLogitBytes = std::size_t{128} << 20;
constexpr std::size_t kFewestLogitRows = 64;

std::size_t logit_rows(const Weight& head, std::size_t n_rows) {
  const std::size_t fit = kLogitBytes / (static_cast<std::size_t>(head.rows()) * sizeof(float));
  return std::min(std::max(fit, kFewestLogitRows), n_rows);
}

}  // namespace

// A block's wanted rows are any number of its rows, and become fewer: so that one graph of the
// layers serves them all, the head's few kernels are not in it.
void CudaBackend::end_of_layers() {
  use_device();
  flush();
  keep_graph_ = false;
}

float* CudaBackend::room_for_logits(const Weight& head, std::size_t n_rows) {
  return grown<float>(logits_, n_rows * static_cast<std::size_t>(head.rows()));
}

void CudaBackend::head(const Input& input, const Linear& head, std::span<const OutputRow> outputs,
                       const HeadRuns& runs) {
  std::vector<int> rows;
  for (const OutputRow& output : outputs) rows.push_back(output.row);
  const int n = static_cast<int>(outputs.size());
  const int* source_rows = metadata_.add(std::span<const int>(rows));
  multiply(prepare(input, {&head, 1}, n, source_rows), {&head, 1}, n, /*accumulate=*/false, runs);
}

void CudaBackend::head_stats(const Input& input, const Weight& head,
                             std::span<const OutputRow> outputs, TokenId mask_token,
                             std::span<RowStats> stats) {
  end_of_layers();
  SBD_CHECK(
      std::ranges::none_of(outputs,
                           [](const OutputRow& output) {
                             return output.ask.rules || output.ask.n_best >= 0 ||
                                    (output.sampling.temperature > 0 && output.sampling.min_p > 0);
                           }),
      "biases, penalties, allowed tokens, min-p and log-probabilities are not computed on a "
      "GPU yet: use device cpu");
  const std::size_t stats_bytes = stats.size() * sizeof(RowNumbers);
  if (host_stats_.size() < stats_bytes) host_stats_ = PinnedMemory(stats_bytes);
  auto* device_stats = grown<RowNumbers>(head_stats_, stats.size());
  const bool sampled = std::ranges::any_of(
      outputs, [](const OutputRow& output) { return output.sampling.temperature > 0; });
  const std::size_t n = outputs.size(), rows_at_once = sampled ? logit_rows(head, n) : n;
  for (std::size_t first = 0; first < outputs.size(); first += rows_at_once) {
    const auto part = outputs.subspan(first, std::min(rows_at_once, outputs.size() - first));
    float* logits = sampled ? room_for_logits(head, part.size()) : nullptr;
    const int n_runs = PackedWeight::of(head).n_blocks();
    auto* runs = grown<RunStats>(head_runs_, part.size() * static_cast<std::size_t>(n_runs));
    this->head(input, {&head, nullptr, logits}, part, {runs, mask_token});
    HeadArgs args{};
    args.runs = runs;
    args.logits = logits;
    args.highest = grown<float>(head_highest_, part.size());
    args.stats = device_stats + first;
    args.n_runs = n_runs;
    args.vocab = head.rows();
    args.mask_token = mask_token;
    cuda::head_stats(tape_, args, static_cast<int>(part.size()));
    if (!sampled) continue;
    std::vector<HeadRow> rows;
    for (const OutputRow& output : part) rows.push_back({output.position, output.sampling});
    args.rows = metadata_.add(std::span<const HeadRow>(rows));
    sample(tape_, args, static_cast<int>(part.size()));
  }
  flush();
  check(cudaMemcpyAsync(host_stats_.data(), device_stats, stats_bytes, cudaMemcpyDeviceToHost,
                        stream_),
        "fetching a forward's statistics");
  check(cudaStreamSynchronize(stream_), "computing a forward");
  for (std::size_t i = 0; i < stats.size(); ++i) {
    RowNumbers row;
    std::memcpy(&row, static_cast<const std::byte*>(host_stats_.data()) + i * sizeof(row),
                sizeof(row));
    stats[i] = {row.argmax,  row.top_probability,    row.margin, row.log_z, row.entropy,
                row.sampled, row.sampled_probability};
  }
  check_finite(stats);
}

void CudaBackend::head_logits(const Input& input, const Weight& head,
                              std::span<const OutputRow> outputs, float* logits) {
  end_of_layers();
  const std::size_t rows_at_once = logit_rows(head, outputs.size());
  for (std::size_t first = 0; first < outputs.size(); first += rows_at_once) {
    const auto part = outputs.subspan(first, std::min(rows_at_once, outputs.size() - first));
    float* computed = room_for_logits(head, part.size());
    this->head(input, {&head, nullptr, computed}, part, {});
    const std::size_t n = part.size() * static_cast<std::size_t>(head.rows());
    flush();
    check(cudaMemcpyAsync(logits, computed, n * sizeof(float), cudaMemcpyDeviceToHost, stream_),
          "fetching logits");
    check(cudaStreamSynchronize(stream_), "computing a forward");
    logits += n;
  }
}

}  // namespace sbd::cuda
