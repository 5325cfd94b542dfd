#include "engine.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <charconv>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda.h"
#include "core/error.h"
#include "core/interrupt.h"
#include "core/notice.h"
#include "decode/registry.h"
#include "decode_defaults.h"
#include "format/fingerprint.h"
#include "format/gguf.h"
#include "format/key_reader.h"
#include "format/text.h"
#include "model/transformer.h"

namespace sbd {

namespace {

constexpr int kMaxThreads = 1024;

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
  const DType kv_dtype = options.kv_dtype;
  const bool floats = values_per_block(kv_dtype) == 1;
  SBD_CHECK(floats || kv_dtype == DType::q8_0, "`kv_dtype` {}: expected f16, bf16, f32 or q8_0",
            name(kv_dtype));
  const bool takes_gpu = options.device == "auto" && cuda::why_unavailable().empty();
  SBD_CHECK(floats || !(gpu || takes_gpu),
            "`kv_dtype` {}: a GPU holds f16, bf16 or f32, `device` cpu this one too",
            name(kv_dtype));
  if (gpu) return cuda::make_backend(*gpu);
  if (takes_gpu) {
    notice(
        "device auto takes the GPU, on which the CUDA backend is unproven: its tests have passed "
        "in software only; device cpu does without");
    return cuda::make_backend(0);
  }
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

void check_fits(int n, int n_ctx, const ModelConfig& config) {
  SBD_CHECK(n <= n_ctx, "expected token ids within the context of {}, got {}: {}", n_ctx, n,
            how_to_fit(n_ctx, n_ctx_limit(config), limiting_window(config)));
}

// The text is the model's own whatever drafts it, so another model's adapter is no error.
void check_fingerprint(const Metadata& adapter, const GgufFile& model) {
  constexpr std::string_view kKey = "sbd.draft.fingerprint";
  if (!adapter.contains(kKey)) return;
  const std::string &theirs = adapter.string(kKey), ours = fingerprint(model);
  if (theirs == ours) return;
  notice(
      format("{}: trained beside another model than {} (fingerprint {}, not {}): the text will be "
             "right, its drafts may not be worth their time",
             adapter.source(), model.metadata().source(), quote(theirs.substr(0, 12)),
             quote(ours.substr(0, 12))));
}

// tokens [begin, end), every row wanted
Segment wanted_rows(const std::vector<TokenId>& tokens, int begin, int end) {
  Segment segment;
  segment.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
  segment.outputs.resize(segment.tokens.size());
  std::iota(segment.outputs.begin(), segment.outputs.end(), 0);
  return segment;
}

}  // namespace

Engine::Engine(const std::filesystem::path& path, const EngineOptions& options)
    : backend_(make_backend(options)), kv_dtype_(options.kv_dtype) {
  const GgufFile file(path);
  const KeyReader general(file.metadata(), "general.");
  SBD_CHECK(general.string("type", "model") != "adapter",
            "{}: an adapter, expected a model: give it as `draft` beside its model",
            file.metadata().source());
  configure(file.metadata(), read_model_config(file.metadata(), file.tensors()), options.n_ctx);
  FileTensors tensors(file);
  std::optional<GgufFile> draft;
  double bytes = tensors.bytes(*backend_);
  if (options.draft) bytes += FileTensors(draft.emplace(*options.draft)).bytes(*backend_);
  check_memory(bytes, file.metadata().source());
  model_ = std::make_unique<Transformer>(config_, tensors, *backend_);
  tensors.check_all_used();
  if (draft) {
    load_draft(*draft);
    check_fingerprint(draft->metadata(), file);
  }
  for (const std::string& line : backend_->notes()) notice(line);
  start(options);
}

Engine::Engine(const Metadata& metadata, DType dtype, bool tie_word_embeddings,
               const EngineOptions& options)
    : backend_(make_backend(options)), kv_dtype_(options.kv_dtype) {
  configure(metadata, read_model_config(metadata), options.n_ctx);
  RandomTensors tensors(dtype, tie_word_embeddings);
  check_memory(tensors.bytes(config_, *backend_), "random weights");
  model_ = std::make_unique<Transformer>(config_, tensors, *backend_);
  if (options.draft) load_draft(GgufFile(*options.draft));
  for (const std::string& line : backend_->notes()) notice(line);
  start(options);
}

void Engine::load_draft(const GgufFile& adapter) {
  model_->set_adapter(adapter);
  const bool has_mask = model_->adapter().mask_embedding != nullptr;
  defaults_ = with_adapter(adapter.metadata(), has_mask, config_, std::move(defaults_));
  limit_block_size();
}

void Engine::limit_block_size() {
  std::optional<int>& block_size = defaults_.block.block_size;
  if (block_size) block_size = std::min(*block_size, n_ctx_);
}

void Engine::start(const EngineOptions& options) {
  const std::size_t budget = options.kv_budget.value_or(backend_->free_memory() / 10 * 9);
  const std::size_t left = options.prefix_cache.value_or(budget / 4);
  scheduler_ = std::make_unique<Scheduler>(
      *model_, SchedulerOptions{n_ctx_, kv_dtype_, budget, std::min(left, budget),
                                Transformer::max_rows(config_)});
}

void Engine::check_memory(double weight_bytes, std::string_view source) const {
  const double activations = Transformer::activation_bytes(config_, Transformer::max_rows(config_));
  const double needed = weight_bytes + activations;
  const auto free = static_cast<double>(backend_->free_memory());
  if (needed <= free) return;
  const auto mib = [](double bytes) { return static_cast<std::int64_t>(bytes / (1 << 20)); };
  fail(
      ErrorKind::memory,
      "{}: the model needs {} MiB, {} for its weights, and {} MiB are free: use a smaller model or "
      "type",
      source, mib(needed), mib(weight_bytes), mib(free));
}

void Engine::configure(const Metadata& metadata, const ModelConfig& config, int n_ctx) {
  metadata_ = metadata;
  config_ = config;
  defaults_ = read_decode_defaults(metadata_, config_);
  defaults_.drafts = std::make_shared<DraftHistory>();
  n_ctx_ = choose_n_ctx(config_, n_ctx);
  SBD_CHECK(config_.head_dim % values_per_block(kv_dtype_) == 0,
            "`kv_dtype` {}: expected a model whose heads have a multiple of {} values, this one's "
            "have {}: use f16",
            name(kv_dtype_), values_per_block(kv_dtype_), config_.head_dim);
  limit_block_size();
}

Engine::~Engine() = default;

const Metadata& Engine::metadata() const { return metadata_; }
const ModelConfig& Engine::config() const { return config_; }
const DecoderOptions& Engine::defaults() const { return defaults_; }
int Engine::n_ctx() const { return n_ctx_; }
int Engine::n_threads() const { return backend_->n_threads(); }
std::size_t Engine::kv_budget() const { return scheduler_->options().kv_budget; }
std::size_t Engine::prefix_cache() const { return scheduler_->options().prefix_cache; }
std::string Engine::device() const { return backend_->description(); }
std::string Engine::auto_decoder() const { return defaults_.named.front(); }
std::vector<std::string> Engine::decoders() const { return able_decoders(defaults_, n_ctx_); }
Usage Engine::usage() const { return scheduler_->usage(); }
int Engine::kv_positions() const { return scheduler_->most_positions(); }
Peaks Engine::measure_peaks() { return backend_->measure_peaks(); }

Engine::Resolved Engine::resolve(const Request& request) const {
  return {request.decoder == "auto" ? auto_decoder() : request.decoder,
          decoder_options(request.options, defaults_)};
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

void Engine::check(const Request& request) const { scheduler_->check(*make_decoder(request)); }

SequenceId Engine::add(const Request& request, std::optional<SequenceId> chosen) {
  return scheduler_->add(request.prompt, make_decoder(request), chosen);
}

void Engine::remove(SequenceId id) { scheduler_->remove(id); }

std::vector<SequenceEvents> Engine::step() { return scheduler_->step(); }

std::vector<float> Engine::forward(const std::vector<TokenId>& tokens, int block) {
  const int n = static_cast<int>(tokens.size());
  SBD_CHECK(n >= 1, "forward needs at least one token id");
  check_fits(n, n_ctx_, config_);
  SBD_CHECK(block >= 0 && block <= n, "block must be between 0 and the {} token ids, got {}", n,
            block);
  KvCache kv = model_->make_kv(n_ctx_, kv_dtype_);
  std::vector<float> logits;
  const int max_rows = Transformer::max_rows(config_);
  // The causal rows in chunks, which bounds the activations' memory, then the block in one.
  for (int begin = 0; begin < n;) {
    const int causal_end = n - block;
    const bool causal = begin < causal_end;
    const int end = causal ? std::min(begin + max_rows, causal_end) : n;
    Segment segment = wanted_rows(tokens, begin, end);
    segment.attention = causal ? Attention::causal : Attention::block;
    const std::vector<float> part = model_->forward_logits({{{&kv, {{segment}}}}});
    logits.insert(logits.end(), part.begin(), part.end());
    begin = end;
    check_interrupt();
  }
  return logits;
}

std::vector<RowScores> Engine::score(const std::vector<TokenId>& tokens, int top) {
  const int n = static_cast<int>(tokens.size());
  SBD_CHECK(n >= 2, "a score needs at least two token ids: nothing stands before the first, got {}",
            n);
  check_fits(n, n_ctx_, config_);
  SBD_CHECK(top >= 0 && top <= config_.vocab_size,
            "expected `top` from 0 to the vocabulary of {}, got {}", config_.vocab_size, top);
  KvCache kv = model_->make_kv(n_ctx_, kv_dtype_);
  std::vector<RowScores> scores;
  const int max_rows = Transformer::max_rows(config_);
  for (int begin = 0; begin < n - 1; begin += max_rows) {
    const int end = std::min(begin + max_rows, n - 1);
    Segment segment = wanted_rows(tokens, begin, end);
    for (int i = begin; i < end; ++i) {
      segment.asks.push_back({.n_best = top, .given = tokens[i + 1]});
    }
    for (const RowStats& row : model_->forward({{{&kv, {{segment}}}}})) {
      scores.push_back(*row.scores);
    }
    check_interrupt();
  }
  return scores;
}

}  // namespace sbd
