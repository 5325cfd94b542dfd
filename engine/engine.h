// The engine: a loaded model and the sequences it decodes. The only place that names a concrete
// backend.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/input_squares.h"
#include "core/peaks.h"
#include "core/profile.h"
#include "decode/decoder.h"
#include "format/model_config.h"
#include "request.h"
#include "scheduler.h"

namespace sbd {

class Backend;
class GgufFile;
class Transformer;

struct EngineOptions {
  std::string device = "auto";                      // "auto", "cpu", "cuda", "cuda:N"
  int n_threads = 0;                                // 0: one per core this process may use
  int n_ctx = 0;                                    // 0: the model's
  DType kv_dtype = DType::f16;                      // f16, bf16, f32 or q8_0
  std::optional<std::filesystem::path> draft = {};  // an adapter for decoders that draft
  // Bytes of all KV caches. None: most of what is free once the model is loaded.
  std::optional<std::size_t> kv_budget = {};
  // Of these, what ended sequences may leave for others whose prompts begin alike. None: a quarter.
  // Nothing unless it is asked for, since it stays taken and makes repeated prompts cheap, which a
  // measurement must not meet.
  std::optional<std::size_t> prefix_cache = 0;
};

class Engine {
 public:
  Engine(const std::filesystem::path& path, const EngineOptions& options);
  // A model of random weights, every matrix in `dtype`: any shape can be timed without a file.
  Engine(const Metadata& metadata, DType dtype, bool tie_word_embeddings,
         const EngineOptions& options);
  ~Engine();

  const Metadata& metadata() const;
  const ModelConfig& config() const;
  const DecoderOptions& defaults() const;
  int n_ctx() const;
  int n_threads() const;
  std::size_t kv_budget() const;     // bytes
  std::size_t prefix_cache() const;  // bytes
  std::string device() const;        // the backend and its instruction set, such as "cpu (avx512)"

  // Of its sequences. Not while another thread steps.
  Usage usage() const;
  // The longest text, prompt and all, whose cache the kv_budget could hold.
  int kv_positions() const;

  // The decoders that can run, each with the file's options.
  std::vector<std::string> decoders() const;
  // What "auto" stands for: the first of the file's decoders.
  std::string auto_decoder() const;

  // The decoder of the request, and its options with the file's where the request has none.
  struct Resolved {
    std::string decoder;
    DecoderOptions options;
  };
  Resolved resolve(const Request& request) const;

  // Throws what add would, but for want of memory. Safe while another thread steps.
  void check(const Request& request) const;
  // Adds the request's sequence; it lives until it has finished, failed or is removed.
  // chosen: its id, above all before it. None: the next one.
  SequenceId add(const Request& request, std::optional<SequenceId> chosen = {});
  void remove(SequenceId id);
  // One forward over living sequences (scheduler.h says which): what happened to each. Finished and
  // failed ones are gone.
  std::vector<SequenceEvents> step();

  // Raw logits [tokens, vocab_size] of an uncached forward: the last `block` rows are one block,
  // the rest causal.
  std::vector<float> forward(const std::vector<TokenId>& tokens, int block);

  // Of each token but the first its log-probability and rank behind those before it, and `top` best
  // tokens there.
  std::vector<RowScores> score(const std::vector<TokenId>& tokens, int top);

  // Times forwards of one block of each of n_sequences, behind a KV cache of `context` positions,
  // statistics wanted on every row: `repeats` rounds over the row counts, so that all see the same
  // state of the machine. Milliseconds [row count][repeat]; with `adapted` those of the row counts
  // once more behind them, every row with the adapter.
  std::vector<std::vector<double>> time_forwards(const std::vector<int>& row_counts, int context,
                                                 int repeats, int n_sequences,
                                                 bool adapted = false);
  // What the layers' matmuls read of a text of 2 tokens at least, but for the last one.
  std::vector<InputSquares> input_squares(const std::vector<TokenId>& tokens);
  Peaks measure_peaks();
  // Where the time of such a forward of one sequence goes; of a GPU.
  ForwardProfile profile_forward(int rows, int context);

 private:
  struct Timed;

  void configure(const Metadata& metadata, const ModelConfig& config, int n_ctx);
  // That there is memory for what loading will take.
  void check_memory(double weight_bytes, std::string_view source) const;
  void load_draft(const GgufFile& adapter);
  // The file's block may be more than the context that the user chose; a request's may not.
  void limit_block_size();
  void start(const EngineOptions& options);
  // Checks the request.
  std::unique_ptr<Decoder> make_decoder(const Request& request) const;
  Timed timed(const std::vector<int>& row_counts, int context, int n_sequences, bool adapted);

  std::unique_ptr<Backend> backend_;
  DType kv_dtype_;
  Metadata metadata_;
  ModelConfig config_;
  DecoderOptions defaults_;
  std::unique_ptr<Transformer> model_;
  int n_ctx_ = 0;
  std::unique_ptr<Scheduler> scheduler_;
};

}  // namespace sbd
