// The engine: a loaded model, the sequences it decodes, and the scheduler step that runs one
// forward over all of them. The only place that names a concrete backend.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/peaks.h"
#include "decode/decoder.h"
#include "format/model_config.h"
#include "request.h"

namespace sbd {

class Backend;
class Transformer;

struct EngineOptions {
  std::string device = "auto";                           // "auto", "cpu", "cuda", "cuda:N"
  int n_threads = 0;                                     // 0: one per core this process may use
  int n_ctx = 0;                                         // 0: the model's
  DType kv_dtype = DType::f16;                           // f16, bf16 or f32
  std::optional<std::filesystem::path> draft_lora = {};  // an adapter for decoders that draft
};

using SequenceId = std::int64_t;

struct SequenceEvents {
  SequenceId id;
  Events events;
  int prompt_rows;    // prompt tokens whose keys and values this forward computed
  std::string error;  // not empty: the sequence could not go on
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
  std::string device() const;  // the backend and its instruction set, such as "cpu (avx512)"

  // What "auto" stands for: the first of the file's decoders.
  std::string auto_decoder() const;

  // The decoder of the request, and its options with the file's where the request has none.
  struct Resolved {
    std::string decoder;
    DecoderOptions options;
  };
  Resolved resolve(const Request& request) const;

  // Throws what add would.
  void check(const Request& request) const;
  // Adds the request's sequence; it lives until it has finished, failed or is removed.
  SequenceId add(const Request& request);
  void remove(SequenceId id);
  // One forward over the living sequences, or over as many as it has rows for, in turn: what
  // happened to each. Finished and failed ones are gone.
  std::vector<SequenceEvents> step();

  // Raw logits [tokens, vocab_size] of an uncached forward: the last `block` rows are one block,
  // the rest causal.
  std::vector<float> forward(const std::vector<TokenId>& tokens, int block);

  // Times forwards of one block of each of n_sequences, behind a KV cache of `context` positions,
  // statistics wanted on every row: `repeats` rounds over the row counts, so that all see the same
  // state of the machine. Milliseconds [row count][repeat].
  std::vector<std::vector<double>> time_forwards(const std::vector<int>& row_counts, int context,
                                                 int repeats, int n_sequences);
  Peaks measure_peaks();

 private:
  struct Sequence;
  struct Turn;

  void configure(const Metadata& metadata, int n_ctx);
  // Checks the request.
  std::unique_ptr<Decoder> make_decoder(const Request& request) const;
  std::vector<Turn> plan_turns();
  void run_turns(std::span<const Turn> turns, std::vector<SequenceEvents>& happened);

  std::unique_ptr<Backend> backend_;
  DType kv_dtype_;
  Metadata metadata_;
  ModelConfig config_;
  DecoderOptions defaults_;
  std::unique_ptr<Transformer> model_;
  int n_ctx_ = 0;
  SequenceId next_id_ = 1;
  SequenceId next_turn_ = 1;  // the sequence the next forward begins with
  std::map<SequenceId, std::unique_ptr<Sequence>> sequences_;
};

}  // namespace sbd
