#include "engine.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <charconv>
#include <optional>
#include <thread>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda.h"
#include "core/error.h"
#include "core/notice.h"
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
            "device \"{}\": expected auto, cpu, cuda or cuda:N", options.device);
  SBD_CHECK(options.n_threads >= 0 && options.n_threads <= kMaxThreads,
            "n_threads must be between 1 and {}, got {}", kMaxThreads, options.n_threads);
  SBD_CHECK(values_per_block(options.kv_dtype) == 1, "kv_dtype {}: expected f16, bf16 or f32",
            name(options.kv_dtype));
  if (gpu) return cuda::make_backend(*gpu);
  if (options.device == "auto" && cuda::why_unavailable().empty()) {
    notice(
        "device auto takes the GPU, on which the CUDA backend is unproven: its tests have passed "
        "in software only; device cpu does without");
    return cuda::make_backend(0);
  }
  return std::make_unique<cpu::CpuBackend>(options.n_threads > 0 ? options.n_threads
                                                                 : available_cores());
}

int n_ctx_limit(const ModelConfig& config) {
  const int limit = config.max_position_embeddings;
  return config.sliding_window > 0 ? std::min(config.sliding_window, limit) : limit;
}

int choose_n_ctx(const ModelConfig& config, int wanted) {
  const int limit = config.max_position_embeddings;
  const int window = n_ctx_limit(config);
  SBD_CHECK(wanted >= 0 && wanted <= limit, "n_ctx must be between 1 and the model's {}, got {}",
            limit, wanted);
  SBD_CHECK(wanted <= window,
            "n_ctx {} is beyond the model's sliding window of {}, which this engine does not "
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
  for (const std::string& line : backend_->notes()) notice(line);
  if (options.draft_lora) model_->set_adapter(GgufFile(*options.draft_lora));
  defaults_.has_adapter = model_->has_adapter();
}

Engine::Engine(const Metadata& metadata, DType dtype, bool tie_word_embeddings,
               const EngineOptions& options)
    : backend_(make_backend(options)), kv_dtype_(options.kv_dtype) {
  configure(metadata, options.n_ctx);
  RandomTensors tensors(dtype, tie_word_embeddings);
  model_ = std::make_unique<Transformer>(config_, tensors, *backend_);
  for (const std::string& line : backend_->notes()) notice(line);
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

std::unique_ptr<Decoder> Engine::make_decoder(const Request& request) const {
  DecodeTask task = decode_task(request, config_, n_ctx_);
  task.n_ctx_limit = n_ctx_limit(config_);
  return sbd::make_decoder(request.decoder == "auto" ? auto_decoder() : request.decoder,
                           std::move(task), decoder_options(request, defaults_));
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
  try {
    if (!turns.empty()) run_turns(turns, happened);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::device) throw;
    happened.clear();  // the caches are gone, of all sequences
    for (const auto& [id, sequence] : sequences_) {
      happened.push_back({id, {}, 0, error.what(), error.kind()});
    }
  }
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
    if (error.kind() == ErrorKind::device) throw;
    // A forward that fails has changed nothing. Alone, a sequence has itself to blame; of several,
    // each is tried alone, so that one's bad numbers do not end the others.
    if (turns.size() == 1) {
      happened.push_back({turns[0].id, {}, 0, error.what(), error.kind()});
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
    happened.push_back(
        {turns[i].id, std::move(events), sequence.absorb_prompt(turns[i].plan, starts[i]), {}, {}});
  }
}

std::vector<float> Engine::forward(const std::vector<TokenId>& tokens, int block) {
  const int n = static_cast<int>(tokens.size());
  SBD_CHECK(n >= 1, "forward needs at least one token id");
  SBD_CHECK(n <= n_ctx_, "expected token ids within the context of {}, got {}: {}", n_ctx_, n,
            how_to_fit(n_ctx_, n_ctx_limit(config_)));
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

}  // namespace sbd
