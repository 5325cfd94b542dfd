// CudaBackend: the LM head. Its matmul leaves the statistics of runs of 128 logits, 24 bytes of
// each; logits themselves go to memory only where they are asked for, or are to be drawn from. What
// rows ask beyond statistics is found in the same place, while a run is in shared memory
// (asked_rows.h). But a given token's rank needs its logit: the matmul runs once more behind it.
#include <algorithm>
#include <bit>
#include <map>

#include "backend/cuda/cuda_backend.h"

namespace sbd::cuda {

namespace {

// Of logits, and of the best tokens of runs, that are in memory at once: the logits of 260 rows of
// 128,000 tokens, each read of the weights for as many rows as may share it.
constexpr std::size_t kHeadBytes = std::size_t{128} << 20;
constexpr std::size_t kFewestRows = 64;

std::size_t rows_at_once(std::size_t row_bytes, std::size_t n_rows) {
  if (row_bytes == 0) return n_rows;
  return std::min(std::max(kHeadBytes / row_bytes, kFewestRows), n_rows);
}

std::size_t logit_bytes(const Weight& head) {
  return static_cast<std::size_t>(head.rows()) * sizeof(float);
}

// What rows want: any of them, or all together.
struct Wanted {
  bool sampled = false, asked = false, scored = false, ranks = false;
  std::size_t n_run_best = 0;  // the most of a row
  std::size_t n_best = 0, n_unadjusted = 0;

  explicit Wanted(std::span<const OutputRow> outputs) {
    for (const OutputRow& output : outputs) {
      const RowAsk& ask = output.ask;
      sampled = sampled || output.sampling.temperature > 0;
      asked = asked || ask.rules || ask.n_best >= 0;
      if (ask.n_best < 0) continue;
      const auto n = static_cast<std::size_t>(ask.n_best);
      scored = true;
      ranks = ranks || ask.given >= 0;
      n_run_best = std::max(n_run_best, std::min<std::size_t>(n, kBlockFeatures));
      n_best += n;
      if (ask.rules) n_unadjusted += ask.rules->adjustments.size();
    }
  }
};

// What comes up from the device, in one block.
struct Results {
  std::size_t n_rows, n_scores, n_best;

  std::size_t size() const {
    return n_rows * sizeof(RowNumbers) + n_scores * sizeof(RowScore) + n_best * sizeof(TokenScore);
  }
  RowNumbers* stats(std::byte* block) const { return reinterpret_cast<RowNumbers*>(block); }
  RowScore* scores(std::byte* block) const {
    return reinterpret_cast<RowScore*>(stats(block) + n_rows);
  }
  TokenScore* best(std::byte* block) const {
    return reinterpret_cast<TokenScore*>(scores(block) + n_scores);
  }
};

}  // namespace

// A block's wanted rows are any number of its rows, and become fewer: so that one graph of the
// layers serves them all, the head's few kernels are not in it.
void CudaBackend::start() {
  use_device();
  flush();
  keep_graph_ = false;
}

float* CudaBackend::room_for_logits(const Weight& head, std::size_t n_rows) {
  return grown<float>(logits_, n_rows * static_cast<std::size_t>(head.rows()));
}

void CudaBackend::head(const Input& input, const Linear& head, std::span<const OutputRow> outputs,
                       const HeadRuns& runs, bool ranks) {
  std::vector<int> rows;
  for (const OutputRow& output : outputs) rows.push_back(output.row);
  const int n = static_cast<int>(outputs.size());
  const int* source_rows = metadata_.add(std::span<const int>(rows));
  const Activations x = prepare(input, {&head, 1}, n, source_rows);
  multiply(x, {&head, 1}, n, /*accumulate=*/false, runs);
  if (!ranks) return;
  const Linear again{head.weight, nullptr, nullptr};
  multiply(x, {&again, 1}, n, /*accumulate=*/false,
           {runs.runs, runs.asks, runs.mask_token, /*ranks=*/1});
}

// Rules go to the device once, whatever rows share them, and all in one transfer.
const AskedRow* CudaBackend::add_asks(std::span<const OutputRow> outputs, std::size_t n_runs,
                                      RowScore* scores, TokenScore* best) {
  const Wanted wanted(outputs);
  std::map<const LogitRules*, AskedRow> ruled;
  std::size_t bytes = outputs.size() * round_up(sizeof(AskedRow), 16);
  for (const OutputRow& output : outputs) {
    const LogitRules* rules = output.ask.rules.get();
    if (rules == nullptr || !ruled.try_emplace(rules).second) continue;
    bytes += round_up(std::span(rules->adjustments).size_bytes(), 16) +
             round_up(std::span(rules->allowed).size_bytes(), 16);
  }
  // As texts grow, so do their rules: not every one asks for memory.
  bytes = std::bit_ceil(bytes);
  if (asks_.size() < bytes) finish();
  asks_.clear(bytes);
  for (auto& [rules, row] : ruled) {
    row.adjustments = asks_.add(std::span<const Adjustment>(rules->adjustments));
    row.n_adjustments = static_cast<int>(rules->adjustments.size());
    if (!rules->allowed.empty()) {
      row.allowed = asks_.add(std::span<const std::uint32_t>(rules->allowed));
    }
  }
  const std::size_t n_own_runs = wanted.scored ? outputs.size() * n_runs : 0;
  auto* runs = grown<RunStats>(head_own_runs_, n_own_runs);
  auto* run_best = grown<TokenScore>(head_run_best_, n_own_runs * wanted.n_run_best);
  auto* unadjusted = grown<float>(
      head_unadjusted_, wanted.n_unadjusted == 0 ? 0 : std::bit_ceil(wanted.n_unadjusted));
  std::vector<AskedRow> rows;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const RowAsk& ask = outputs[i].ask;
    AskedRow row = ask.rules ? ruled.at(ask.rules.get()) : AskedRow{};
    if (ask.n_best >= 0) {
      row.score = scores + i;
      row.runs = runs + i * n_runs;
      row.n_run_best = std::min(ask.n_best, kBlockFeatures);
      row.run_best = run_best + i * n_runs * wanted.n_run_best;
      row.n_best = ask.n_best;
      row.best = best;
      best += ask.n_best;
      row.unadjusted = unadjusted;
      unadjusted += row.n_adjustments;
      row.given = ask.given;
    }
    rows.push_back(row);
  }
  return asks_.add(std::span<const AskedRow>(rows));
}

void CudaBackend::head_stats(const Input& input, const Weight& head,
                             std::span<const OutputRow> outputs, TokenId mask_token,
                             std::span<RowStats> stats) {
  start();
  const Wanted wanted(outputs);
  const auto n_runs = static_cast<std::size_t>(PackedWeight::of(head).n_blocks());
  const std::size_t row_bytes =
      (wanted.sampled ? logit_bytes(head) : 0) + n_runs * wanted.n_run_best * sizeof(TokenScore);
  const std::size_t at_once = rows_at_once(row_bytes, outputs.size());
  for (std::size_t first = 0; first < outputs.size(); first += at_once) {
    const std::size_t n = std::min(at_once, outputs.size() - first);
    head_stats_part(input, head, outputs.subspan(first, n), mask_token, stats.subspan(first, n));
  }
  check_finite(stats);
}

void CudaBackend::head_stats_part(const Input& input, const Weight& head,
                                  std::span<const OutputRow> outputs, TokenId mask_token,
                                  std::span<RowStats> stats) {
  const Wanted wanted(outputs);
  const std::size_t n = outputs.size();
  const auto n_runs = static_cast<std::size_t>(PackedWeight::of(head).n_blocks());
  const Results results{n, wanted.scored ? n : 0, wanted.n_best};
  if (host_results_.size() < results.size()) host_results_ = PinnedMemory(results.size());
  auto* block = grown<std::byte>(head_results_, results.size());
  float* logits = wanted.sampled ? room_for_logits(head, n) : nullptr;
  auto* runs = grown<RunStats>(head_runs_, n * n_runs);
  HeadArgs args{};
  args.runs = runs;
  args.logits = logits;
  args.highest = grown<float>(head_highest_, n);
  args.stats = results.stats(block);
  args.n_runs = static_cast<int>(n_runs);
  args.vocab = head.rows();
  args.mask_token = mask_token;
  if (wanted.asked) {
    args.asks = add_asks(outputs, n_runs, results.scores(block), results.best(block));
  }
  const int n_rows = static_cast<int>(n);
  this->head(input, {&head, nullptr, logits}, outputs, {runs, args.asks, mask_token, 0},
             wanted.ranks);
  cuda::head_stats(tape_, args, n_rows);
  if (wanted.sampled) {
    std::vector<HeadRow> rows;
    for (const OutputRow& output : outputs) rows.push_back({output.position, output.sampling});
    args.rows = metadata_.add(std::span<const HeadRow>(rows));
    sample(tape_, args, n_rows);
  }
  if (wanted.scored) head_scores(tape_, args, n_rows);
  flush();
  std::byte* host = host_results_.data();
  check(cudaMemcpyAsync(host, block, results.size(), cudaMemcpyDeviceToHost, stream_),
        "fetching a forward's statistics");
  check(cudaStreamSynchronize(stream_), "computing a forward");
  if (wanted.asked) asks_.clear(0);
  const TokenScore* best = results.best(host);
  for (std::size_t i = 0; i < n; ++i) {
    const RowNumbers& row = results.stats(host)[i];
    stats[i] = {row.argmax,  row.top_probability,    row.margin, row.log_z, row.entropy,
                row.sampled, row.sampled_probability};
    const int n_best = outputs[i].ask.n_best;
    if (n_best < 0) continue;
    const RowScore& score = results.scores(host)[i];
    stats[i].scores =
        std::make_shared<RowScores>(RowScores{score.token, score.rank, {best, best + n_best}});
    best += n_best;
  }
}

void CudaBackend::head_logits(const Input& input, const Weight& head,
                              std::span<const OutputRow> outputs, float* logits) {
  start();
  const std::size_t at_once = rows_at_once(logit_bytes(head), outputs.size());
  for (std::size_t first = 0; first < outputs.size(); first += at_once) {
    const auto part = outputs.subspan(first, std::min(at_once, outputs.size() - first));
    float* computed = room_for_logits(head, part.size());
    this->head(input, {&head, nullptr, computed}, part, {}, /*ranks=*/false);
    const std::size_t n = part.size() * static_cast<std::size_t>(head.rows());
    flush();
    check(cudaMemcpyAsync(logits, computed, n * sizeof(float), cudaMemcpyDeviceToHost, stream_),
          "fetching logits");
    check(cudaStreamSynchronize(stream_), "computing a forward");
    logits += n;
  }
}

}  // namespace sbd::cuda
