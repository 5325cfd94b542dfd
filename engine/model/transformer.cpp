#include "model/transformer.h"

#include "core/error.h"

namespace sbd {

KvCache::KvCache(Backend& backend, const ModelConfig& config, int n_ctx, DType dtype)
    : storage_(backend.allocate_kv(
          config.num_hidden_layers,
          {config.num_attention_heads, config.num_key_value_heads, config.head_dim}, n_ctx, dtype)),
      capacity_(n_ctx) {}

Transformer::Transformer(const ModelConfig& config, TensorSource& source, Backend& backend)
    : config_(config),
      heads_{config.num_attention_heads, config.num_key_value_heads, config.head_dim},
      backend_(backend),
      weights_(load_weights(config, source, backend)) {}

KvCache Transformer::make_kv(int n_ctx, DType dtype) const {
  return KvCache(backend_, config_, n_ctx, dtype);
}

std::vector<RowStats> Transformer::forward(const Batch& batch) {
  run_layers(batch);
  std::vector<RowStats> stats(outputs_.size());
  if (!outputs_.empty()) {
    backend_.head_stats(head_input(), weights_.head(), outputs_, config_.mask_token_id.value_or(-1),
                        stats);
  }
  commit(batch);
  return stats;
}

std::vector<float> Transformer::forward_logits(const Batch& batch) {
  run_layers(batch);
  std::vector<float> logits(outputs_.size() * static_cast<std::size_t>(config_.vocab_size));
  if (!outputs_.empty()) {
    backend_.head_logits(head_input(), weights_.head(), outputs_, logits.data());
  }
  commit(batch);
  return logits;
}

Input Transformer::head_input() const {
  return {residual_.get(), weights_.norm.get(), config_.rms_norm_eps};
}

// The last act of a forward: one that throws leaves every cache as it was.
void Transformer::commit(const Batch& batch) {
  for (const SequenceSegments& sequence : batch.sequences) {
    for (const Segment& segment : sequence.segments) {
      if (segment.kv == Kv::commit) sequence.kv->commit(static_cast<int>(segment.tokens.size()));
    }
  }
}

void Transformer::run_layers(const Batch& batch) {
  gather_rows(batch);
  reserve(tokens_.size());
  const float eps = config_.rms_norm_eps;
  Backend& b = backend_;
  float* x = residual_.get();

  b.begin({tokens_, positions_, kv_end_, sequences_}, weights_.inverse_frequencies,
          config_.rope_interleaved);
  b.embed(*weights_.embedding, x);
  Matmuls next = matmuls(0);
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    const LayerWeights& w = weights_.layers[i];
    const Matmuls m = next;
    const bool last = i + 1 == config_.num_hidden_layers;
    if (!last) next = matmuls(i + 1);
    b.linear({x, w.attn_norm.get(), eps}, m.qkv, /*accumulate=*/false, m.o);
    b.rotate_and_cache(i, heads_, w.q_norm.get(), w.k_norm.get(), eps, q_.get(), k_.get(),
                       v_.get());
    b.attention(i, heads_, q_.get(), attended_.get());
    b.linear({attended_.get()}, m.o, /*accumulate=*/true, m.gate_up);
    b.linear({x, w.ffn_norm.get(), eps}, m.gate_up, /*accumulate=*/false, m.down);
    b.linear({.x = gate_.get(), .up = up_.get()}, m.down, /*accumulate=*/true,
             last ? std::span<const Linear>() : next.qkv);
  }
}

Transformer::Matmuls Transformer::matmuls(int layer) const {
  const LayerWeights& w = weights_.layers[layer];
  return {{Linear{w.q.get(), w.q_bias.get(), q_.get()},
           {w.k.get(), w.k_bias.get(), k_.get()},
           {w.v.get(), w.v_bias.get(), v_.get()}},
          {Linear{w.o.get(), w.o_bias.get(), residual_.get()}},
          {Linear{w.gate.get(), nullptr, gate_.get()}, {w.up.get(), nullptr, up_.get()}},
          {Linear{w.down.get(), nullptr, residual_.get()}}};
}

void Transformer::gather_rows(const Batch& batch) {
  tokens_.clear();
  positions_.clear();
  kv_end_.clear();
  sequences_.clear();
  outputs_.clear();
  for (const SequenceSegments& sequence : batch.sequences) {
    const int first_row = static_cast<int>(tokens_.size());
    int position = sequence.kv->length();
    bool scratch = false;
    for (const Segment& segment : sequence.segments) {
      const int n = static_cast<int>(segment.tokens.size());
      const int row = static_cast<int>(tokens_.size());
      SBD_CHECK(position + n <= sequence.kv->capacity(),
                "the KV cache holds {} positions, but {} are needed: raise n_ctx",
                sequence.kv->capacity(), position + n);
      SBD_CHECK(!(scratch && segment.kv == Kv::commit),
                "a committed segment cannot follow a scratch one");
      scratch = segment.kv == Kv::scratch;
      for (int i = 0; i < n; ++i) {
        const TokenId token = segment.tokens[i];
        SBD_CHECK(token >= 0 && token < config_.vocab_size,
                  "token id {} is outside the vocabulary of {}", token, config_.vocab_size);
        tokens_.push_back(token);
        positions_.push_back(position + i);
        kv_end_.push_back(segment.attention == Attention::causal ? position + i + 1 : position + n);
      }
      for (const int output : segment.outputs) {
        SBD_CHECK(output >= 0 && output < n, "output row {} of a segment of {} rows", output, n);
        outputs_.push_back({row + output, position + output, segment.sampling});
      }
      position += n;
    }
    const int n_rows = static_cast<int>(tokens_.size()) - first_row;
    if (n_rows > 0) sequences_.push_back({sequence.kv->storage(), first_row, n_rows});
  }
  SBD_CHECK(!tokens_.empty(), "a forward needs at least one row");
}

void Transformer::reserve(std::size_t n_rows) {
  if (n_rows <= reserved_rows_) return;
  const auto allocate = [&](int cols) {
    return backend_.allocate(n_rows * static_cast<std::size_t>(cols));
  };
  const int q_size = heads_.num_attention_heads * heads_.head_dim;
  const int kv_size = heads_.num_key_value_heads * heads_.head_dim;
  residual_ = allocate(config_.hidden_size);
  q_ = allocate(q_size);
  k_ = allocate(kv_size);
  v_ = allocate(kv_size);
  attended_ = allocate(q_size);
  gate_ = allocate(config_.intermediate_size);
  up_ = allocate(config_.intermediate_size);
  reserved_rows_ = n_rows;
}

}  // namespace sbd
