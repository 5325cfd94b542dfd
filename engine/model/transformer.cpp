#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "core/error.h"

namespace sbd {

namespace {

constexpr int kMaxRows = 512, kMinRows = 16;
// Of the activations of one forward: that of kMaxRows rows, and that of a block, which comes whole.
constexpr double kMaxBytes = 512 << 20, kMaxBlockBytes = 4 * kMaxBytes;

HeadShape head_shape(const ModelConfig& config) {
  return {config.num_attention_heads, config.num_key_value_heads, config.head_dim};
}

void check_rules(const LogitRules& rules, int vocab_size, TokenId mask) {
  const std::size_t words = (static_cast<std::size_t>(vocab_size) + 31) / 32;
  SBD_CHECK(rules.allowed.empty() || rules.allowed.size() == words,
            "expected a set of allowed tokens of {} words, one bit for each of {} tokens, got {}",
            words, vocab_size, rules.allowed.size());
  bool any = rules.allowed.empty();
  for (int first = 0; first < vocab_size && !any; first += 32) {
    std::uint32_t tokens = rules.allowed[first / 32];
    if (vocab_size - first < 32) tokens &= (1u << (vocab_size - first)) - 1;
    if (mask >= first && mask - first < 32) tokens &= ~(1u << (mask - first));
    any = tokens != 0;
  }
  SBD_CHECK(any, "no token is allowed here");
  TokenId last = -1;
  for (const Adjustment& one : rules.adjustments) {
    SBD_CHECK(one.token > last && one.token < vocab_size,
              "expected adjusted tokens ascending and below {}, got {} behind {}", vocab_size,
              one.token, last);
    SBD_CHECK(one.bias < std::numeric_limits<float>::infinity() && one.factor > 0 &&
                  std::isfinite(one.factor) && std::isfinite(one.penalty),
              "token {}: expected a bias, a factor above 0 and a finite penalty, got {}, {} and {}",
              one.token, one.bias, one.factor, one.penalty);
    last = one.token;
  }
}

}  // namespace

KvCache::KvCache(Backend& backend, const ModelConfig& config, int capacity, DType dtype)
    : storage_(backend.allocate_kv(config.num_hidden_layers, head_shape(config), capacity, dtype)),
      capacity_(capacity) {}

Transformer::Transformer(const ModelConfig& config, TensorSource& source, Backend& backend)
    : config_(config),
      heads_(head_shape(config)),
      backend_(backend),
      weights_(load_weights(config, source, backend)) {}

// The buffers of reserve(), and what a backend makes of a matmul's input.
double Transformer::activation_bytes(const ModelConfig& config, double n_rows) {
  const double q_size = double(config.num_attention_heads) * config.head_dim;
  const double kv_size = double(config.num_key_value_heads) * config.head_dim;
  const double row =
      3.0 * config.hidden_size + 3 * q_size + 2 * kv_size + 4.0 * config.intermediate_size;
  return n_rows * row * sizeof(float);
}

int Transformer::max_rows(const ModelConfig& config) {
  const double rows = kMaxBytes / activation_bytes(config, 1);
  return std::clamp(static_cast<int>(rows), kMinRows, kMaxRows);
}

KvCache Transformer::make_kv(int capacity, DType dtype) const {
  return KvCache(backend_, config_, capacity, dtype);
}

std::size_t Transformer::kv_bytes(int capacity, DType dtype, int n_positions) const {
  return backend_.kv_bytes(config_.num_hidden_layers, heads_, capacity, dtype, n_positions);
}

void Transformer::set_adapter(const GgufFile& file) {
  const bool quantised = values_per_block(weights_.layers.front().q->dtype()) > 1;
  adapter_ = load_adapter(file, config_, backend_, quantised);
}

std::vector<RowStats> Transformer::forward(const Batch& batch) {
  run_layers(batch);
  settle_rules(batch);
  std::vector<RowStats> stats(outputs_.size());
  if (!outputs_.empty()) {
    backend_.head_stats(head_input(), weights_.head(), outputs_,
                        config_.mask_token_id.value_or(kMaskSlot), stats);
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

std::vector<InputSquares> Transformer::input_squares(const std::function<void()>& forwards) {
  std::vector<InputSquares> squares;
  std::map<const Weight*, std::size_t> places;
  for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
    const LayerWeights& layer = weights_.layers[i];
    for (const auto& [name, weight] : {std::pair{"attn_q", layer.q.get()},
                                       {"attn_k", layer.k.get()},
                                       {"attn_v", layer.v.get()},
                                       {"attn_output", layer.o.get()},
                                       {"ffn_gate", layer.gate.get()},
                                       {"ffn_up", layer.up.get()},
                                       {"ffn_down", layer.down.get()}}) {
      places[weight] = squares.size();
      squares.push_back({format("blk.{}.{}.weight", i, name),
                         std::vector<double>(static_cast<std::size_t>(weight->cols()))});
    }
  }
  backend_.observe_inputs([&](std::span<const Linear> linears, const float* x, int n_rows) {
    for (const Linear& linear : linears) {
      InputSquares& all = squares[places.at(linear.weight)];
      all.n_rows += n_rows;
      const float* value = x;
      for (int row = 0; row < n_rows; ++row) {
        for (double& sum : all.sums) {
          sum += double(*value) * *value;
          ++value;
        }
      }
    }
  });
  struct End {
    Backend& backend;
    ~End() { backend.observe_inputs({}); }
  } end{backend_};
  forwards();
  return squares;
}

// On a GPU, while it computes the layers.
void Transformer::settle_rules(const Batch& batch) {
  bool started = false;
  for (const SequencePlan& sequence : batch.sequences) {
    if (!sequence.plan.before_head) continue;
    if (!std::exchange(started, true)) backend_.start();
    sequence.plan.before_head();
  }
  for (const OutputRow& output : outputs_) {
    if (!output.ask.rules) continue;
    check_rules(*output.ask.rules, config_.vocab_size, config_.mask_token_id.value_or(kMaskSlot));
  }
}

Input Transformer::head_input() const {
  return {head_input_, weights_.norm.get(), config_.rms_norm_eps};
}

// The last act of a forward: one that throws leaves every cache as it was.
void Transformer::commit(const Batch& batch) {
  for (std::size_t i = 0; i < batch.sequences.size(); ++i) {
    batch.sequences[i].kv->set_lengths(kv_lengths_[i]);
  }
}

void Transformer::run_layers(const Batch& batch) {
  gather_rows(batch);
  const auto& [encoding, thinking, decoding] = rows_;
  reserve(encoding.tokens.size());
  const int t = config_.layer_sections[0], d = t + config_.layer_sections[1];
  const auto& [e, h, z] = residual_;

  begin(encoding);
  backend_.embed(*weights_.embedding, adapter_.mask_embedding.get(), e.get());
  if (uniform_) {
    run(0, config_.num_hidden_layers, e.get());
    head_input_ = e.get();
    return;
  }
  run(0, t, e.get());
  if (!thinking.tokens.empty()) {
    begin(thinking);
    backend_.mix(thinking.mixes, e.get(), e.get(), config_.hidden_size, h.get());
    run(t, d, h.get());
  }
  if (!decoding.tokens.empty()) {
    begin(decoding);
    backend_.mix(decoding.mixes, e.get(), h.get(), config_.hidden_size, z.get());
    run(d, config_.num_hidden_layers, z.get());
  }
  head_input_ = z.get();
}

void Transformer::begin(const Rows& rows) {
  query_scale_.clear();
  // RoPE's factor is on queries and keys, which only meet each other: its square is on queries
  // here.
  const double rope = config_.rope_attention_factor * config_.rope_attention_factor;
  const double growth = config_.attention_temperature_scale;
  if (rope != 1 || growth != 0) {
    for (const int position : rows.positions) {
      const int lengths = growth == 0 ? 0 : position / config_.attention_temperature_length;
      query_scale_.push_back(static_cast<float>(rope * (1 + growth * std::log1p(lengths))));
    }
  }
  ForwardRows given{rows.tokens,    rows.positions, rows.kv_end,
                    rows.sequences, query_scale_,   rows.adapted};
  if (rows.branches) {
    given.places = rows.places;
    given.unseen = rows.unseen;
  }
  backend_.begin(given, weights_.inverse_frequencies, config_.rope_interleaved);
}

void Transformer::run(int first, int end, float* x) {
  const float eps = config_.rms_norm_eps;
  Backend& b = backend_;
  if (first == end) return;
  Matmuls next = matmuls(first, x);
  for (int i = first; i < end; ++i) {
    const LayerWeights& w = weights_.layers[i];
    const Matmuls m = next;
    const bool last = i + 1 == end;
    if (!last) next = matmuls(i + 1, x);
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

Transformer::Matmuls Transformer::matmuls(int layer, float* x) const {
  static const Adapter::Layer kNone{};
  const LayerWeights& w = weights_.layers[layer];
  const Adapter::Layer& a = adapter_.empty() ? kNone : adapter_.layers[layer];
  return {{Linear{w.q.get(), w.q_bias.get(), q_.get(), a.q.view()},
           {w.k.get(), w.k_bias.get(), k_.get(), a.k.view()},
           {w.v.get(), w.v_bias.get(), v_.get(), a.v.view()}},
          {Linear{w.o.get(), w.o_bias.get(), x, a.o.view()}},
          {Linear{w.gate.get(), nullptr, gate_.get(), a.gate.view()},
           {w.up.get(), nullptr, up_.get(), a.up.view()}},
          {Linear{w.down.get(), nullptr, x, a.down.view()}}};
}

void Transformer::Rows::clear() {
  tokens.clear();
  positions.clear();
  places.clear();
  kv_end.clear();
  unseen.clear();
  branches = false;
  sequences.clear();
  mixes.clear();
  adapted.clear();
}

void Transformer::Rows::add(TokenId token, int position, int place, int end, Interval hidden,
                            bool with_adapter) {
  const int row = size();
  if (with_adapter && !adapted.empty() && adapted.back().end == row) {
    ++adapted.back().end;
  } else if (with_adapter) {
    adapted.push_back({row, row + 1});
  }
  tokens.push_back(token);
  positions.push_back(position);
  places.push_back(place);
  kv_end.push_back(end);
  unseen.push_back(hidden);
  branches = branches || place != position;
}

void Transformer::gather_rows(const Batch& batch) {
  for (Rows& rows : rows_) rows.clear();
  kv_lengths_.clear();
  outputs_.clear();
  uniform_ = true;
  for (const SequencePlan& sequence : batch.sequences) {
    for (const Segment& segment : sequence.plan.segments) {
      uniform_ = uniform_ && segment.layers == Layers::all && segment.e_factor == 0 &&
                 segment.h_factor == 1;
      SBD_CHECK(!segment.adapted || !adapter_.empty(),
                "a segment asks for an adapter, and none is loaded");
      SBD_CHECK(
          !segment.adapted || segment.kv == Kv::scratch,
          "a segment is kept in the cache and asks for an adapter, expected one or the other");
    }
  }
  for (const SequencePlan& sequence : batch.sequences) gather_sequence(sequence);
  SBD_CHECK(!rows_[0].tokens.empty(), "a forward needs at least one row");
}

namespace {

// How many positions of a sequence a section of layers has in the cache, as a forward's segments go
// by.
struct SectionLength {
  int kept = 0;     // behind the forward
  int written = 0;  // within it
  bool begun = false;

  // The first rows may go over cached positions once more, the others continue them.
  void add(int position, int n, Kv kv) {
    SBD_CHECK(begun ? position == written : position <= written,
              "rows from position {} on do not continue the {} cached ones", position, written);
    written = position + n;
    if (kv == Kv::commit) {
      kept = written;
    } else if (!begun) {
      kept = position;
    }
    begun = true;
  }
};

}  // namespace

TokenId Transformer::embedded(TokenId token, bool adapted) const {
  const bool masks = adapted && adapter_.mask_embedding != nullptr;
  if (masks && token == config_.mask_token_id.value_or(kMaskSlot)) return kMaskSlot;
  SBD_CHECK(token >= 0 && token < config_.vocab_size, "token id {} is outside the vocabulary of {}",
            token, config_.vocab_size);
  return token;
}

void Transformer::gather_sequence(const SequencePlan& sequence) {
  auto& [encoding, thinking, decoding] = rows_;
  const KvCache& kv = *sequence.kv;
  std::array<int, kLayerSections> first_row;
  std::array<SectionLength, kLayerSections> lengths;
  for (int r = 0; r < kLayerSections; ++r) {
    first_row[r] = rows_[r].size();
    lengths[r].kept = lengths[r].written = kv.lengths()[r];
  }

  int place = sequence.plan.start.value_or(kv.length());  // in the cache
  bool scratch = false, branches = false;
  for (const Segment& segment : sequence.plan.segments) {
    const int n = static_cast<int>(segment.tokens.size());
    SBD_CHECK(place + n <= kv.capacity(), "the KV cache holds {} positions, but {} are needed",
              kv.capacity(), place + n);
    SBD_CHECK(!(scratch && segment.kv == Kv::commit),
              "a committed segment cannot follow a scratch one");
    scratch = segment.kv == Kv::scratch;
    branches = branches || segment.begin;
    const int first = segment.begin.value_or(place);  // its position
    SBD_CHECK(!branches || (scratch && segment.begin && first >= 0 && first <= place && uniform_),
              "expected rows that go on from within those before them to be scratch, and only such "
              "behind them, got a segment at position {}",
              first);
    const bool thinks = segment.layers != Layers::skip, decodes = segment.layers != Layers::refill;
    if (n > 0) {
      lengths[0].add(place, n, segment.kv);
      if (thinks) lengths[1].add(place, n, segment.kv);
      if (decodes) lengths[2].add(place, n, segment.kv);
    }
    const int first_output = uniform_ ? encoding.size() : decoding.size();
    for (int i = 0; i < n; ++i) {
      const TokenId token = embedded(segment.tokens[i], segment.adapted);
      const int end = segment.attention == Attention::causal ? place + i + 1 : place + n;
      const auto add = [&](Rows& rows, const Mix& mix) {
        rows.add(token, first + i, place + i, end, {first, place}, segment.adapted);
        if (!uniform_) rows.mixes.push_back(mix);
      };
      const int e = encoding.size(), h = thinking.size();
      add(encoding, {});
      if (uniform_) continue;
      if (thinks) add(thinking, {e, 1, 0, 0});
      if (decodes) add(decoding, {e, segment.e_factor, h, thinks ? segment.h_factor : 0});
    }
    SBD_CHECK(segment.asks.empty() || segment.asks.size() == segment.outputs.size(),
              "{} rows are wanted and {} asks given", segment.outputs.size(), segment.asks.size());
    for (std::size_t i = 0; i < segment.outputs.size(); ++i) {
      const int output = segment.outputs[i];
      SBD_CHECK(decodes && output >= 0 && output < n, "output row {} of a segment of {} rows",
                output, decodes ? n : 0);
      const RowAsk ask = segment.asks.empty() ? RowAsk{} : segment.asks[i];
      SBD_CHECK(ask.given < config_.vocab_size && ask.n_best <= config_.vocab_size,
                "token {} or {} best tokens are beyond the vocabulary of {}", ask.given, ask.n_best,
                config_.vocab_size);
      outputs_.push_back(
          {first_output + output, first + output + segment.decides - 1, segment.sampling, ask});
    }
    place += n;
  }
  for (int r = 0; r < kLayerSections; ++r) {
    const int n_rows = rows_[r].size() - first_row[r];
    if (n_rows > 0) rows_[r].sequences.push_back({kv.storage(), first_row[r], n_rows});
  }
  kv_lengths_.push_back({lengths[0].kept, lengths[1].kept, lengths[2].kept});
}

void Transformer::reserve(std::size_t n_rows) {
  const auto allocate = [&](int cols) {
    return backend_.allocate(n_rows * static_cast<std::size_t>(cols));
  };
  if (n_rows > reserved_rows_) {
    const double bytes = activation_bytes(config_, static_cast<double>(n_rows));
    if (bytes > kMaxBlockBytes) {
      fail(ErrorKind::memory,
           "a forward of {} rows takes {} bytes, expected at most {}: use a smaller `block_size`",
           n_rows, static_cast<std::int64_t>(bytes), static_cast<std::int64_t>(kMaxBlockBytes));
    }
    const int q_size = heads_.num_attention_heads * heads_.head_dim;
    const int kv_size = heads_.num_key_value_heads * heads_.head_dim;
    residual_ = {allocate(config_.hidden_size)};
    q_ = allocate(q_size);
    k_ = allocate(kv_size);
    v_ = allocate(kv_size);
    attended_ = allocate(q_size);
    gate_ = allocate(config_.intermediate_size);
    up_ = allocate(config_.intermediate_size);
    reserved_rows_ = n_rows;
  }
  n_rows = reserved_rows_;
  for (Buffer& residual : residual_) {
    if (!uniform_ && residual == nullptr) residual = allocate(config_.hidden_size);
  }
}

}  // namespace sbd
