#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <ranges>
#include <utility>

#include "core/error.h"

namespace sbd {
namespace {

// Positions that a cache grows by at least, where it may.
constexpr int kGrowth = 256;
// Texts within so many times the mean are most of them, whatever they are of.
constexpr double kLikely = 1.5;
constexpr double kNewest = 0.1;  // the share in the mean of the text that ended last

// A shorter common beginning is computed again rather than copied.
constexpr int kMinShared = 16;
// How much longer a forward may take for the prompts that are read in it. The 95th percentile of
// the time between tokens is to stay within three times of alone, and of like forwards it lies a
// quarter above the median.
constexpr double kMaxSlowdown = 2.3;
// Whatever they cost: on a CPU that is slow at it, 5 rows take three times as long as one.
constexpr int kMinPrefillRows = 2;
// Rows that a prompt comes nearer for each forward that has passed it over.
constexpr int kRowsForWaiting = 64;
// After so many a prompt that cannot be cut is read whatever it takes.
constexpr int kMaxPassedOver = 8;

// Why something could not be done for one sequence.
struct Failure {
  std::string error;
  ErrorKind kind;

  SequenceEvents of(SequenceId id) && {
    return {.id = id, .error = std::move(error), .error_kind = kind};
  }
};

// What fn() throws, but for a device's end, which is the end of all sequences.
template <typename Fn>
std::optional<Failure> failure(Fn&& fn) {
  try {
    fn();
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::device) throw;
    return Failure{error.what(), error.kind()};
  } catch (const std::bad_alloc&) {
    return Failure{"out of memory for a forward: use a shorter prompt or block", ErrorKind::memory};
  }
  return std::nullopt;
}

}  // namespace

// The newest token of the text may not be cached yet, and where a draft was refused its place holds
// another.
int Scheduler::Sequence::shared_positions() const {
  const int most = sharing.text ? static_cast<int>(tokens.size()) - 1 : prompt_tokens;
  return sharing.kind.empty() ? 0 : std::min(kv->length(), most) / sharing.unit * sharing.unit;
}

Scheduler::Scheduler(Transformer& model, const SchedulerOptions& options)
    : model_(model), options_(options) {}

Usage Scheduler::usage() const {
  Usage usage = counted_;
  usage.kv_used = used_bytes_;
  usage.kv_cached = parked_bytes_;
  for (const auto& [id, sequence] : sequences_) ++(sequence.kv ? usage.admitted : usage.waiting);
  return usage;
}

int Scheduler::most_positions() const {
  const auto positions = std::views::iota(1, options_.n_ctx + 1);
  const auto first_too_long = std::ranges::partition_point(
      positions, [&](int n) { return bytes(n) <= options_.kv_budget; });
  return static_cast<int>(first_too_long - positions.begin());
}

bool Scheduler::fits(std::size_t more_bytes) const {
  return used_bytes_ + parked_bytes_ + more_bytes <= options_.kv_budget;
}

std::size_t Scheduler::check(const Decoder& decoder) const {
  const std::size_t needed = bytes(decoder.most_positions());
  if (needed > options_.kv_budget) {
    fail(
        ErrorKind::memory,
        "the KV cache of {} positions takes {} bytes, more than the `kv_budget` of {}: shorten the "
        "prompt, lower `max_tokens` or raise `kv_budget`",
        decoder.most_positions(), needed, options_.kv_budget);
  }
  return needed;
}

SequenceId Scheduler::add(std::vector<TokenId> prompt, std::unique_ptr<Decoder> decoder,
                          std::optional<SequenceId> chosen) {
  const std::size_t needed = check(*decoder);
  const SequenceId id = chosen.value_or(next_id_);
  const int prompt_tokens = static_cast<int>(prompt.size());
  Sharing sharing = decoder->sharing();
  sequences_.emplace(id, Sequence{.id = id,
                                  .tokens = std::move(prompt),
                                  .prompt_tokens = prompt_tokens,
                                  .decoder = std::move(decoder),
                                  .sharing = std::move(sharing),
                                  .claim = {.held = 0, .most = needed}});
  next_id_ = id + 1;
  return id;
}

void Scheduler::remove(SequenceId id) {
  if (sequences_.contains(id)) end(id);
}

void Scheduler::end(SequenceId id) {
  Sequence& sequence = sequences_.at(id);
  if (sequence.kv) {
    living_.remove(sequence.sharing.kind, sequence.prompt(), id);
    used_bytes_ -= sequence.claim.held;
    const auto n = static_cast<double>(sequence.tokens.size()) - sequence.prompt_tokens;
    mean_tokens_ = mean_tokens_ ? *mean_tokens_ + kNewest * (n - *mean_tokens_) : n;
    try {
      park(sequence);
    } catch (const std::bad_alloc&) {  // then nothing of it is left for others
    }
  }
  sequences_.erase(id);
}

// ---- room for caches ----

std::size_t Scheduler::likely_bytes(const Sequence& sequence, int n_positions,
                                    int new_tokens) const {
  const int more = std::max(kGrowth, new_tokens);
  return std::min(sequence.claim.most,
                  bytes(std::min(options_.n_ctx, n_positions + std::min(more, options_.n_ctx))));
}

bool Scheduler::may_hold(const Sequence& sequence, std::size_t held) const {
  std::vector<Claim> claims = {{.held = held, .most = std::max(held, sequence.claim.most)}};
  for (const auto& [id, other] : sequences_) {
    if (other.kv && id != sequence.id) claims.push_back(other.claim);
  }
  return all_can_end(std::move(claims), options_.kv_budget);
}

bool Scheduler::make_room(Sequence& sequence, int n_positions) {
  std::size_t& held = sequence.claim.held;
  const std::size_t needed =
      std::min(sequence.claim.most, bytes(std::min(options_.n_ctx, n_positions)));
  if (needed <= held) return true;
  for (const std::size_t wanted : {likely_bytes(sequence, n_positions, 0), needed}) {
    if (!may_hold(sequence, wanted)) continue;
    while (!fits(wanted - held)) take_parked(parked_.begin()->first);
    used_bytes_ += wanted - held;
    held = wanted;
    return true;
  }
  return false;
}

// ---- what is cached, and by whom ----

void Scheduler::admit(std::vector<SequenceEvents>& happened) {
  for (auto& [id, sequence] : sequences_) {
    if (sequence.kv) continue;
    const Lender lender = find_lender(sequence);
    if (lender.living != nullptr && lender.n > lender.living->shared_positions()) {
      continue;  // its prompt is being read by another
    }
    const int new_tokens =
        mean_tokens_ ? static_cast<int>(kLikely * *mean_tokens_) : options_.n_ctx;
    const int first = std::max(sequence.prompt_tokens, sequence.decoder->demand().least_rows);
    const std::size_t wanted = likely_bytes(sequence, first, new_tokens);
    if (!may_hold(sequence, wanted)) return;  // those behind it wait too
    while (!fits(wanted) && !parked_.empty()) {
      const bool first_lends = parked_.begin()->first == lender.parked;
      if (first_lends && parked_.size() == 1) break;
      take_parked(first_lends ? std::next(parked_.begin())->first : parked_.begin()->first);
    }
    const std::size_t taken = lender.parked ? parked_.at(*lender.parked).bytes : 0;
    if (!fits(wanted - std::min(wanted, taken))) return;
    if (auto failed = failure([&] { start(sequence, lender, wanted); })) {
      happened.push_back(std::move(*failed).of(id));
    }
  }
}

Scheduler::Lender Scheduler::find_lender(const Sequence& sequence) {
  const Sharing& sharing = sequence.sharing;
  Lender lender;
  if (sharing.kind.empty()) return lender;
  const std::span<const TokenId> prompt = sequence.prompt();
  const auto usable = [&](int n) {
    return std::min(n, sharing.most) / sharing.unit * sharing.unit;
  };
  if (const auto match = living_.longest(sharing.kind, prompt)) {
    lender.living = &sequences_.at(match->id);
    lender.n = usable(match->length);
  }
  if (const auto match = parked_tokens_.longest(sharing.kind, prompt)) {
    if (usable(match->length) > lender.n) {
      lender = {.parked = match->id, .n = usable(match->length)};
    }
  }
  return lender.n < kMinShared ? Lender{} : lender;
}

// A cache that is mostly what the sequence needs is taken over; from others it is copied.
void Scheduler::start(Sequence& sequence, const Lender& lender, std::size_t held) {
  std::optional<KvCache> kv;
  if (lender.parked) {
    const Parked& parked = parked_.at(*lender.parked);
    const bool mostly = 2 * lender.n >= static_cast<int>(parked.tokens.size());
    Parked taken = take_parked(*lender.parked);
    if (mostly || !fits(held + taken.bytes)) {
      kv = std::move(taken.kv);
    } else {
      kv = model_.make_kv(options_.n_ctx, options_.kv_dtype);
      kv->copy(taken.kv, lender.n);
      keep(std::move(taken));
    }
  } else {
    kv = model_.make_kv(options_.n_ctx, options_.kv_dtype);
    if (lender.living != nullptr) kv->copy(*lender.living->kv, lender.n);
  }
  kv->truncate(lender.n);
  if (lender.n > 0) sequence.decoder->begin_behind(lender.n);
  sequence.prompt_read = sequence.cached_tokens = lender.n;
  living_.add(sequence.sharing.kind, {sequence.prompt().begin(), sequence.prompt().end()},
              sequence.id);
  sequence.kv = std::move(kv);  // it is admitted: from here on nothing may fail
  sequence.claim.held = held;
  used_bytes_ += held;
  counted_.prompt_tokens += sequence.prompt_tokens;
  counted_.cached_tokens += lender.n;
}

void Scheduler::park(Sequence& sequence) {
  const int n = sequence.shared_positions();
  const std::size_t n_bytes = bytes(n);
  if (n < kMinShared || n_bytes > options_.prefix_cache) return;
  sequence.tokens.resize(static_cast<std::size_t>(n));
  // What this one begins with, or what begins with it, is kept once.
  const std::string& kind = sequence.sharing.kind;
  if (const auto match = parked_tokens_.longest(kind, sequence.tokens)) {
    const int other = static_cast<int>(parked_.at(match->id).tokens.size());
    if (match->length == other) {
      take_parked(match->id);
    } else if (match->length == n) {
      return;
    }
  }
  while (parked_bytes_ + n_bytes > options_.prefix_cache || !fits(n_bytes)) {
    if (parked_.empty()) return;
    take_parked(parked_.begin()->first);
  }
  sequence.kv->truncate(n);
  keep({kind, std::move(sequence.tokens), std::move(*sequence.kv), n_bytes});
}

void Scheduler::keep(Parked parked) {
  const auto place = parked_.emplace(next_parked_++, std::move(parked)).first;
  const auto& [id, kept] = *place;
  try {
    parked_tokens_.add(kept.kind, kept.tokens, id);
  } catch (const std::bad_alloc&) {
    parked_.erase(place);
    throw;
  }
  parked_bytes_ += kept.bytes;
}

Scheduler::Parked Scheduler::take_parked(SequenceId id) {
  auto node = parked_.extract(id);
  Parked parked = std::move(node.mapped());
  parked_tokens_.remove(parked.kind, parked.tokens, id);
  parked_bytes_ -= parked.bytes;
  return parked;
}

// ---- forwards ----

std::vector<SequenceEvents> Scheduler::step() {
  std::vector<SequenceEvents> happened;
  happened.reserve(sequences_.size());  // one each at most: telling it takes no memory
  try {
    admit(happened);
    const std::vector<Turn> turns = choose_turns(happened);
    if (!turns.empty()) run(turns, happened);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::device) throw;
    happened.clear();  // the caches are gone, of all sequences
    for (const auto& [id, sequence] : sequences_) {
      happened.push_back({.id = id, .error = error.what(), .error_kind = error.kind()});
    }
  }
  for (const SequenceEvents& events : happened) {
    if (events.events.finished || !events.error.empty()) end(events.id);
  }
  return happened;
}

std::vector<Scheduler::Turn> Scheduler::choose_turns(std::vector<SequenceEvents>& happened) {
  std::vector<Turn> turns;
  int n_rows = 0;
  RowPrice price{.costs = &decoding_costs_, .sequences = 0};
  const auto take_turn = [&](Sequence& sequence, int rows) {
    int taken = 0;
    auto failed = failure([&] {
      Plan plan = sequence.decoder->plan({rows, price});
      const int n = plan.n_rows();
      const int start = plan.start.value_or(sequence.kv->length());
      if (!make_room(sequence, start + n)) return;
      turns.push_back({&sequence, std::move(plan), start});
      taken = n;
    });
    if (failed) happened.push_back(std::move(*failed).of(sequence.id));
    n_rows += taken;
    return taken;
  };

  struct Reader {
    Sequence* sequence;
    Demand demand;
    int order() const { return demand.prompt_rows - kRowsForWaiting * sequence->passed_over; }
  };
  std::vector<Reader> readers;
  std::vector<Sequence*> decoding;
  for (auto& [id, sequence] : sequences_) {
    if (!sequence.kv) continue;
    const Demand demand = sequence.decoder->demand();
    if (demand.prompt_rows > 0) {
      readers.push_back({&sequence, demand});
    } else {
      decoding.push_back(&sequence);
    }
  }
  // In turn: a forward that is full leaves the rest to the next one.
  const auto first = std::ranges::find_if(
      decoding, [&](const Sequence* sequence) { return sequence->id >= next_turn_; });
  std::ranges::rotate(decoding, first);
  next_turn_ = 0;
  price.sequences = static_cast<int>(decoding.size());
  for (const Sequence* sequence : decoding) price.others += sequence->decoding_rows;
  for (Sequence* sequence : decoding) {
    if (n_rows >= options_.max_rows) {
      next_turn_ = sequence->id;
      break;
    }
    // As many as last time, of those whose turn is still to come.
    price.others -= sequence->decoding_rows;
    sequence->decoding_rows = take_turn(*sequence, options_.max_rows - n_rows);
    price.others += sequence->decoding_rows;
  }

  // A draft behind a prompt is verified beside all of them, the readers with a row each.
  price.sequences += static_cast<int>(readers.size());
  price.others += std::max(0, static_cast<int>(readers.size()) - 1);
  std::ranges::stable_sort(readers, {}, &Reader::order);
  const int row_budget =
      n_rows == 0 ? options_.max_rows : std::min(options_.max_rows, n_rows + prefill_rows(n_rows));
  for (const Reader& reader : readers) {
    const bool fits = n_rows + reader.demand.least_rows <= row_budget;
    const bool must = turns.empty() || reader.sequence->passed_over >= kMaxPassedOver;
    if (fits || (must && n_rows < row_budget)) {
      take_turn(*reader.sequence, row_budget - n_rows);
    } else {
      ++reader.sequence->passed_over;
    }
  }
  return turns;
}

int Scheduler::prefill_rows(int decoding_rows) const {
  const double max_ms = kMaxSlowdown * costs_.ms(decoding_rows);
  int rows = kMinPrefillRows;
  // Not far beyond what has been measured.
  while (rows < options_.max_rows && decoding_rows + rows < costs_.max_rows() &&
         costs_.ms(decoding_rows + rows + kMinPrefillRows) <= max_ms) {
    rows += kMinPrefillRows;
  }
  return rows;
}

void Scheduler::run(std::span<const Turn> turns, std::vector<SequenceEvents>& happened) {
  std::vector<RowStats> stats;
  if (auto failed = failure([&] { stats = forward(turns); })) {
    // A forward that fails has changed nothing. Alone, a sequence has itself to blame; of several,
    // each is tried alone, so that one's size or bad numbers do not end the others.
    if (turns.size() == 1) {
      happened.push_back(std::move(*failed).of(turns[0].sequence->id));
      return;
    }
    for (const Turn& turn : turns) run({&turn, 1}, happened);
    return;
  }
  std::span<const RowStats> rest = stats;
  for (const Turn& turn : turns) {
    const auto n_outputs = static_cast<std::size_t>(turn.plan.n_outputs());
    const auto own = rest.first(n_outputs);
    rest = rest.subspan(n_outputs);
    auto failed = failure([&] { happened.push_back(absorb(turn, own)); });
    if (failed) happened.push_back(std::move(*failed).of(turn.sequence->id));
  }
}

std::vector<RowStats> Scheduler::forward(std::span<const Turn> turns) {
  Batch batch;
  int n_rows = 0;
  bool reads = false;
  for (const auto& [sequence, plan, start] : turns) {
    reads = reads || sequence->prompt_read < sequence->prompt_tokens;
    batch.sequences.push_back({&*sequence->kv, plan});
    n_rows += plan.n_rows();
  }
  const auto begin = std::chrono::steady_clock::now();
  std::vector<RowStats> stats = model_.forward(batch);
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - begin;
  costs_.record(n_rows, elapsed.count());
  if (!reads) decoding_costs_.record(n_rows, elapsed.count());
  ++counted_.forwards;
  counted_.rows += n_rows;
  return stats;
}

SequenceEvents Scheduler::absorb(const Turn& turn, std::span<const RowStats> stats) {
  const auto& [sequence, plan, start] = turn;
  Events events = sequence->decoder->absorb(plan, stats);
  sequence->tokens.insert(sequence->tokens.end(), events.committed.begin(), events.committed.end());
  const int end = start + plan.n_rows();
  const int read = std::clamp(end, sequence->prompt_read, sequence->prompt_tokens);
  const int prompt_rows = read - std::exchange(sequence->prompt_read, read);
  counted_.prompt_rows += prompt_rows;
  SequenceEvents happened{.id = sequence->id,
                          .events = std::move(events),
                          .prompt_rows = prompt_rows,
                          .cached_tokens = sequence->begun ? 0 : sequence->cached_tokens};
  sequence->begun = true;
  return happened;
}

}  // namespace sbd
