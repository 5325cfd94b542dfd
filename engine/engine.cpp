#include "engine.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <charconv>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda.h"
#include "core/error.h"
#include "core/random.h"
#include "decode_defaults.h"
#include "format/gguf.h"
#include "model/transformer.h"

namespace sbd {

namespace {

constexpr int kMaxThreads = 1024;
// Rows of all sequences beyond which no further one joins a forward, and rows of a forward outside
// of decoding.
constexpr int kMostRows = DecodeTask().prefill_rows;

int available_cores() {
#if defined(__linux__)
  cpu_set_t cores;  // where taskset or a container's set of CPUs allows fewer, this says so
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

// N of "cuda:N"; 0 for "cuda", nothing for another device.
std::optional<int> gpu_index(const std::string& device) {
  if (device == "cuda") return 0;
  int index = 0;
  if (!device.starts_with("cuda:")) return std::nullopt;
  const char* end = device.data() + device.size();
  const auto [rest, error] = std::from_chars(device.data() + 5, end, index);
  if (error != std::errc() || rest != end || index < 0) return std::nullopt;
  return index;
}

// "auto" is the first GPU where one can be used.
std::unique_ptr<Backend> make_backend(const EngineOptions& options) {
  const std::optional<int> gpu = gpu_index(options.device);
  SBD_CHECK(gpu || options.device == "auto" || options.device == "cpu",
            "`device` \"{}\": expected auto, cpu, cuda or cuda:N", options.device);
  SBD_CHECK(options.n_threads >= 0 && options.n_threads <= kMaxThreads,
            "`n_threads` must be between 1 and {}, got {}", kMaxThreads, options.n_threads);
  SBD_CHECK(values_per_block(options.kv_dtype) == 1, "`kv_dtype` {}: expected f16, bf16 or f32",
            name(options.kv_dtype));
  if (gpu) return cuda::make_backend(*gpu);
  if (options.device == "auto" && cuda::why_unavailable().empty()) return cuda::make_backend(0);
  return std::make_unique<cpu::CpuBackend>(options.n_threads > 0 ? options.n_threads
                                                                 : available_cores());
}

// The sliding window where it is shorter than the model's context, beyond which this engine does
// not compute; else 0.
int limiting_window(const ModelConfig& config) {
  return config.sliding_window < config.max_position_embeddings ? config.sliding_window : 0;
}

int n_ctx_limit(const ModelConfig& config) {
  const int window = limiting_window(config);
  return window > 0 ? window : config.max_position_embeddings;
}

int choose_n_ctx(const ModelConfig& config, int wanted) {
  const int limit = config.max_position_embeddings;
  const int window = n_ctx_limit(config);
  SBD_CHECK(wanted >= 0 && wanted <= limit, "`n_ctx` must be between 1 and the model's {}, got {}",
            limit, wanted);
  SBD_CHECK(wanted <= window,
            "`n_ctx` {} is beyond the model's sliding window of {}, which this engine does not "
            "compute: use at most {}",
            wanted, window, window);
  return wanted > 0 ? wanted : window;
}

}  // namespace

struct Engine::Sequence {
  KvCache kv;
  std::unique_ptr<Decoder> decoder;
  int prompt_tokens;
  int prompt_tokens_read = 0;

  // How many prompt tokens a forward that ran `plan`, from position `start`, was the first to read.
  int absorb_prompt(const Plan& plan, int start) {
    for (const Segment& segment : plan.segments) start += static_cast<int>(segment.tokens.size());
    const int before = prompt_tokens_read;
    prompt_tokens_read = std::clamp(start, before, prompt_tokens);
    return prompt_tokens_read - before;
  }
};

// What a sequence wants of the next forward.
struct Engine::Turn {
  SequenceId id;
  Sequence* sequence;
  Plan plan;
};

Engine::Engine(const std::filesystem::path& path, const EngineOptions& options)
    : backend_(make_backend(options)), kv_dtype_(options.kv_dtype) {
  const GgufFile file(path);
  configure(file.metadata(), options.n_ctx);
  FileTensors tensors(file);
  model_ = std::make_unique<Transformer>(config_, tensors, *backend_);
  tensors.check_all_used();
  if (options.draft_lora) model_->set_adapter(GgufFile(*options.draft_lora));
  defaults_.has_adapter = model_->has_adapter();
}

Engine::Engine(const Metadata& metadata, DType dtype, bool tie_word_embeddings,
               const EngineOptions& options)
    : backend_(make_backend(options)), kv_dtype_(options.kv_dtype) {
  configure(metadata, options.n_ctx);
  RandomTensors tensors(dtype, tie_word_embeddings);
  model_ = std::make_unique<Transformer>(config_, tensors, *backend_);
}

void Engine::configure(const Metadata& metadata, int n_ctx) {
  metadata_ = metadata;
  config_ = read_model_config(metadata_);
  defaults_ = read_decode_defaults(metadata_, config_);
  n_ctx_ = choose_n_ctx(config_, n_ctx);
  // The file's block may be more than the context that the user chose; a request's may not.
  std::optional<int>& block_size = defaults_.block.block_size;
  if (block_size) block_size = std::min(*block_size, n_ctx_);
}

Engine::~Engine() = default;

const Metadata& Engine::metadata() const { return metadata_; }
const ModelConfig& Engine::config() const { return config_; }
const DecoderOptions& Engine::defaults() const { return defaults_; }
int Engine::n_ctx() const { return n_ctx_; }
int Engine::n_threads() const { return backend_->n_threads(); }
std::string Engine::device() const { return backend_->description(); }
std::string Engine::auto_decoder() const { return defaults_.named.front(); }
Peaks Engine::measure_peaks() { return backend_->measure_peaks(); }

Engine::Resolved Engine::resolve(const Request& request) const {
  return {request.decoder == "auto" ? auto_decoder() : request.decoder,
          decoder_options(request, defaults_)};
}

std::unique_ptr<Decoder> Engine::make_decoder(const Request& request) const {
  DecodeTask task = decode_task(request, config_, n_ctx_);
  task.n_ctx_limit = n_ctx_limit(config_);
  task.sliding_window = limiting_window(config_);
  const auto [decoder, options] = resolve(request);
  std::unique_ptr<Decoder> made = sbd::make_decoder(decoder, std::move(task), options);
  check_effect(request, decoder, options, n_ctx_);
  return made;
}

void Engine::check(const Request& request) const { make_decoder(request); }

SequenceId Engine::add(const Request& request) {
  std::unique_ptr<Decoder> decoder = make_decoder(request);
  sequences_.emplace(next_id_, std::make_unique<Sequence>(
                                   Sequence{model_->make_kv(n_ctx_, kv_dtype_), std::move(decoder),
                                            static_cast<int>(request.prompt.size())}));
  return next_id_++;
}

void Engine::remove(SequenceId id) { sequences_.erase(id); }

std::vector<SequenceEvents> Engine::step() {
  std::vector<SequenceEvents> happened;
  const std::vector<Turn> turns = plan_turns();
  if (!turns.empty()) run_turns(turns, happened);
  for (const SequenceEvents& events : happened) {
    if (events.events.finished || !events.error.empty()) sequences_.erase(events.id);
  }
  return happened;
}

// Round robin: a forward that is full leaves the rest to the next one.
std::vector<Engine::Turn> Engine::plan_turns() {
  std::vector<Turn> turns;
  std::size_t n_rows = 0;
  auto next = sequences_.lower_bound(next_turn_);
  while (turns.size() < sequences_.size() && n_rows < static_cast<std::size_t>(kMostRows)) {
    if (next == sequences_.end()) next = sequences_.begin();
    turns.push_back({next->first, next->second.get(), next->second->decoder->plan()});
    for (const Segment& segment : turns.back().plan.segments) n_rows += segment.tokens.size();
    ++next;
  }
  next_turn_ = next == sequences_.end() ? 0 : next->first;
  return turns;
}

void Engine::run_turns(std::span<const Turn> turns, std::vector<SequenceEvents>& happened) {
  Batch batch;
  std::vector<int> starts;
  for (const Turn& turn : turns) {
    const KvCache& kv = turn.sequence->kv;
    batch.sequences.push_back({&turn.sequence->kv, turn.plan});
    starts.push_back(turn.plan.start.value_or(kv.length()));
  }
  std::vector<RowStats> stats;
  try {
    stats = model_->forward(batch);
  } catch (const Error& error) {
    // A forward that fails has changed nothing. Alone, a sequence has itself to blame; of several,
    // each is tried alone, so that one's bad numbers do not end the others.
    if (turns.size() == 1) {
      happened.push_back({turns[0].id, {}, 0, error.what()});
      return;
    }
    for (const Turn& turn : turns) run_turns({&turn, 1}, happened);
    return;
  }
  std::span<const RowStats> rest = stats;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    std::size_t n_outputs = 0;
    for (const Segment& segment : turns[i].plan.segments) n_outputs += segment.outputs.size();
    Sequence& sequence = *turns[i].sequence;
    Events events = sequence.decoder->absorb(rest.first(n_outputs));
    rest = rest.subspan(n_outputs);
    happened.push_back({turns[i].id, std::move(events),
                        sequence.absorb_prompt(turns[i].plan, starts[i]), std::string()});
  }
}

std::vector<float> Engine::forward(const std::vector<TokenId>& tokens, int block) {
  const int n = static_cast<int>(tokens.size());
  SBD_CHECK(n >= 1, "forward needs at least one token id");
  SBD_CHECK(n <= n_ctx_, "expected token ids within the context of {}, got {}: {}", n_ctx_, n,
            how_to_fit(n_ctx_, n_ctx_limit(config_), limiting_window(config_)));
  SBD_CHECK(block >= 0 && block <= n, "block must be between 0 and the {} token ids, got {}", n,
            block);
  KvCache kv = model_->make_kv(n_ctx_, kv_dtype_);
  std::vector<float> logits;
  // The causal rows in chunks, which bounds the activations' memory, then the block in one.
  for (int begin = 0; begin < n;) {
    const int causal_end = n - block;
    const bool causal = begin < causal_end;
    const int end = causal ? std::min(begin + kMostRows, causal_end) : n;
    Segment segment;
    segment.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
    segment.attention = causal ? Attention::causal : Attention::block;
    for (int i = 0; i < end - begin; ++i) segment.outputs.push_back(i);
    const std::vector<float> part = model_->forward_logits({{{&kv, {{segment}}}}});
    logits.insert(logits.end(), part.begin(), part.end());
    begin = end;
  }
  return logits;
}

std::vector<std::vector<double>> Engine::time_forwards(const std::vector<int>& row_counts,
                                                       int context, int repeats, int n_sequences) {
  SBD_CHECK(n_sequences >= 1, "n_sequences must be at least 1, got {}", n_sequences);
  const auto random_tokens = [&](int n, Kv kv_use, Attention attention) {
    Segment segment;
    segment.kv = kv_use;
    segment.attention = attention;
    for (int i = 0; i < n; ++i) {
      const std::uint64_t bits =
          combine(static_cast<std::uint64_t>(n), static_cast<std::uint64_t>(i));
      segment.tokens.push_back(
          static_cast<TokenId>(bits % static_cast<std::uint64_t>(config_.vocab_size)));
    }
    return segment;
  };
  std::vector<KvCache> kvs;
  for (int i = 0; i < n_sequences; ++i) kvs.push_back(model_->make_kv(n_ctx_, kv_dtype_));
  std::vector<Batch> batches;
  for (const int rows : row_counts) {
    SBD_CHECK(rows >= 1 && context >= 0 && rows <= n_ctx_ && context <= n_ctx_ - rows,
              "{} rows behind a context of {} exceed the model's context of {}", rows, context,
              n_ctx_);
    Segment block = random_tokens(rows, Kv::scratch, Attention::block);
    for (int i = 0; i < rows; ++i) block.outputs.push_back(i);
    batches.emplace_back();
    for (KvCache& kv : kvs) batches.back().sequences.push_back({&kv, {{block}}});
  }
  for (KvCache& kv : kvs) {
    while (kv.length() < context) {
      const int n = std::min(kMostRows, context - kv.length());
      model_->forward({{{&kv, {{random_tokens(n, Kv::commit, Attention::causal)}}}}});
    }
  }
  for (const Batch& batch : batches) model_->forward(batch);  // warms caches and grows buffers
  std::vector<std::vector<double>> milliseconds(batches.size());
  for (int i = 0; i < repeats; ++i) {
    for (std::size_t j = 0; j < batches.size(); ++j) {
      const auto start = std::chrono::steady_clock::now();
      model_->forward(batches[j]);
      const std::chrono::duration<double, std::milli> elapsed =
          std::chrono::steady_clock::now() - start;
      milliseconds[j].push_back(elapsed.count());
    }
  }
  return milliseconds;
}

}  // namespace sbd
