// Who runs in the next forward, and with how many rows; which sequences share what is cached.
//
// Sequences that decode come first, with the rows that they need. What a forward has left beside
// them goes to prompts: as many rows as keep it from taking several times as long. The shortest
// remaining prompt comes first, but none waits for ever.
//
// A sequence is admitted when the KV budget has room for what it will likely need, by what texts
// before it came to: few write as much as they may. One that outgrows that gets more where all can
// still end, one after another (kv_claims.h), and else pauses until another has ended. Until it is
// admitted it waits in line. One that ends leaves its cache for others whose prompts begin alike,
// as long as there is room; one whose prompt begins as that of a sequence that is being read waits
// for it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "decode/decoder.h"
#include "decode/forward_costs.h"
#include "kv_claims.h"
#include "model/transformer.h"
#include "prefix_index.h"

namespace sbd {

using SequenceId = std::int64_t;

struct SequenceEvents {
  SequenceId id;
  Events events = {};
  int prompt_rows = 0;    // prompt tokens whose keys and values this forward computed
  int cached_tokens = 0;  // prompt tokens that another sequence had left, told by the first forward
  std::string error = {};  // not empty: the sequence could not go on
  ErrorKind error_kind = ErrorKind::value;
};

struct SchedulerOptions {
  int n_ctx = 0;
  DType kv_dtype = DType::f16;
  std::size_t kv_budget = 0;     // bytes of all caches
  std::size_t prefix_cache = 0;  // of these, what ended sequences may leave
  int max_rows = 512;            // Transformer::max_rows
};

// What a scheduler has done so far, and what its caches take now.
struct Usage {
  std::int64_t forwards = 0;
  std::int64_t rows = 0;           // of these
  std::int64_t prompt_rows = 0;    // of these, of prompts
  std::int64_t prompt_tokens = 0;  // of admitted sequences
  std::int64_t cached_tokens = 0;  // of these, what another sequence had left
  std::size_t kv_used = 0;         // bytes of the budget, by admitted sequences
  std::size_t kv_cached = 0;       // by what ended ones left
  int admitted = 0;
  int waiting = 0;  // for room in the budget
};

class Scheduler {
 public:
  Scheduler(Transformer& model, const SchedulerOptions& options);

  const SchedulerOptions& options() const { return options_; }
  Usage usage() const;
  // The longest cache that the budget can hold.
  int most_positions() const;

  // Bytes of the budget that it may come to need. Refuses what the budget could never hold.
  std::size_t check(const Decoder& decoder) const;
  // chosen: its id, above all before it. None: the next one.
  SequenceId add(std::vector<TokenId> prompt, std::unique_ptr<Decoder> decoder,
                 std::optional<SequenceId> chosen = {});
  // The sequence ends here, if it has not: its cache is left for others.
  void remove(SequenceId id);
  // One forward: what happened to each sequence in it. Finished and failed ones are gone. Where the
  // device fails, all of them are told, those that wait too. What memory is missing for ends alone,
  // with an error; std::bad_alloc says that there is none even to tell it, and all are to be
  // removed.
  std::vector<SequenceEvents> step();

 private:
  struct Sequence {
    SequenceId id;
    std::vector<TokenId> tokens;  // the prompt, then the text as far as it is committed
    int prompt_tokens;
    std::unique_ptr<Decoder> decoder;
    Sharing sharing;
    Claim claim;                     // on the budget; nothing is held before it is admitted
    std::optional<KvCache> kv = {};  // none: it waits to be admitted
    int prompt_read = 0;             // prompt tokens whose keys and values are cached
    int cached_tokens = 0;           // of these, what another sequence had left
    bool begun = false;              // a forward has run
    int passed_over = 0;             // forwards that had no room for its prompt
    int decoding_rows = 1;           // that it had in the last forward

    std::span<const TokenId> prompt() const {
      return {tokens.data(), static_cast<std::size_t>(prompt_tokens)};
    }
    // Positions of its cache that others may have by now.
    int shared_positions() const;
  };
  struct Turn {
    Sequence* sequence;
    Plan plan;
    int start;  // the position of its first row
  };
  // What an ended sequence left: a cache of so many tokens.
  struct Parked {
    std::string kind;
    std::vector<TokenId> tokens;
    KvCache kv;
    std::size_t bytes;
  };
  // Whose cache begins like a sequence's prompt, and for how many positions.
  struct Lender {
    Sequence* living = nullptr;
    std::optional<SequenceId> parked = {};
    int n = 0;
  };

  std::size_t bytes(int n_positions) const {
    return model_.kv_bytes(options_.n_ctx, options_.kv_dtype, n_positions);
  }
  bool fits(std::size_t more_bytes) const;
  // Of the budget, for a sequence of so many positions and what it will likely come to need soon.
  std::size_t likely_bytes(const Sequence& sequence, int n_positions, int new_tokens) const;
  // Whether all can still end if the sequence holds so many bytes.
  bool may_hold(const Sequence& sequence, std::size_t held) const;
  // Lets its cache grow to that many positions, if it may.
  bool make_room(Sequence& sequence, int n_positions);
  void admit(std::vector<SequenceEvents>& happened);
  Lender find_lender(const Sequence& sequence);
  // held: bytes of the budget.
  void start(Sequence& sequence, const Lender& lender, std::size_t held);
  void park(Sequence& sequence);
  void keep(Parked parked);  // as used just now
  Parked take_parked(SequenceId id);
  void end(SequenceId id);

  std::vector<Turn> choose_turns(std::vector<SequenceEvents>& happened);
  int prefill_rows(int decoding_rows) const;
  void run(std::span<const Turn> turns, std::vector<SequenceEvents>& happened);
  // Where it throws, nothing has changed.
  std::vector<RowStats> forward(std::span<const Turn> turns);
  SequenceEvents absorb(const Turn& turn, std::span<const RowStats> stats);

  Transformer& model_;
  SchedulerOptions options_;
  ForwardCosts costs_;
  ForwardCosts decoding_costs_;  // without prompts, whose rows want no statistics

  Usage counted_;  // what only grows
  SequenceId next_id_ = 1;
  SequenceId next_parked_ = 1;
  SequenceId next_turn_ = 1;  // the decoding sequence that the next forward begins with
  std::map<SequenceId, Sequence> sequences_;  // those without a cache wait, in this order
  std::size_t used_bytes_ = 0;                // by admitted sequences
  std::optional<double> mean_tokens_;         // of texts that ended lately

  PrefixIndex living_;  // admitted sequences, by their prompts
  PrefixIndex parked_tokens_;
  std::map<SequenceId, Parked>
      parked_;  // numbered anew when it is used: the oldest use comes first
  std::size_t parked_bytes_ = 0;
};

}  // namespace sbd
