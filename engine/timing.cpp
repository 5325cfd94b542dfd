// Engine: its forwards timed, and taken apart.
#include <algorithm>
#include <chrono>

#include "backend/backend.h"
#include "core/interrupt.h"
#include "core/random.h"
#include "engine.h"
#include "model/transformer.h"

namespace sbd {

namespace {

Segment random_segment(int n, int vocab_size, Kv kv, Attention attention) {
  Segment segment;
  segment.kv = kv;
  segment.attention = attention;
  for (int i = 0; i < n; ++i) {
    const std::uint64_t bits =
        combine(static_cast<std::uint64_t>(n), static_cast<std::uint64_t>(i));
    segment.tokens.push_back(static_cast<TokenId>(bits % static_cast<std::uint64_t>(vocab_size)));
  }
  return segment;
}

}  // namespace

// Sequences whose caches hold `context` positions, and what runs behind them.
struct Engine::Timed {
  std::vector<KvCache> kvs;
  // [row count]: a block of each sequence, statistics on every row; then the same, adapted
  std::vector<Batch> batches;
};

Engine::Timed Engine::timed(const std::vector<int>& row_counts, int context, int n_sequences,
                            bool adapted) {
  SBD_CHECK(n_sequences >= 1, "n_sequences must be at least 1, got {}", n_sequences);
  SBD_CHECK(!adapted || !model_->adapter().empty(), "expected a `draft` adapter, got none");
  Timed timed;
  for (int i = 0; i < n_sequences; ++i) timed.kvs.push_back(model_->make_kv(n_ctx_, kv_dtype_));
  for (const int rows : row_counts) {
    SBD_CHECK(rows >= 1 && context >= 0 && rows <= n_ctx_ && context <= n_ctx_ - rows,
              "{} rows behind a context of {} exceed the model's context of {}", rows, context,
              n_ctx_);
    Segment block = random_segment(rows, config_.vocab_size, Kv::scratch, Attention::block);
    for (int i = 0; i < rows; ++i) block.outputs.push_back(i);
    timed.batches.emplace_back();
    for (KvCache& kv : timed.kvs) timed.batches.back().sequences.push_back({&kv, {{block}}});
  }
  for (std::size_t i = 0; adapted && i < row_counts.size(); ++i) {
    Batch batch = timed.batches[i];
    for (SequencePlan& sequence : batch.sequences) sequence.plan.segments[0].adapted = true;
    timed.batches.push_back(std::move(batch));
  }
  for (KvCache& kv : timed.kvs) {
    while (kv.length() < context) {
      const int n = std::min(Transformer::max_rows(config_), context - kv.length());
      model_->forward(
          {{{&kv, {{random_segment(n, config_.vocab_size, Kv::commit, Attention::causal)}}}}});
      check_interrupt();
    }
  }
  return timed;
}

std::vector<std::vector<double>> Engine::time_forwards(const std::vector<int>& row_counts,
                                                       int context, int repeats, int n_sequences,
                                                       bool adapted) {
  const Timed all = timed(row_counts, context, n_sequences, adapted);
  for (const Batch& batch : all.batches) {  // warms caches, grows buffers
    model_->forward(batch);
    check_interrupt();
  }
  std::vector<std::vector<double>> milliseconds(all.batches.size());
  for (int i = 0; i < repeats; ++i) {
    for (std::size_t j = 0; j < all.batches.size(); ++j) {
      const auto start = std::chrono::steady_clock::now();
      model_->forward(all.batches[j]);
      const std::chrono::duration<double, std::milli> elapsed =
          std::chrono::steady_clock::now() - start;
      milliseconds[j].push_back(elapsed.count());
      check_interrupt();
    }
  }
  return milliseconds;
}

std::vector<InputSquares> Engine::input_squares(const std::vector<TokenId>& tokens) {
  return model_->input_squares([&] { score(tokens, /*top=*/0); });
}

ForwardProfile Engine::profile_forward(int rows, int context) {
  const Timed all = timed({rows}, context, 1, /*adapted=*/false);
  return backend_->profile([&] { model_->forward(all.batches[0]); });
}

}  // namespace sbd
