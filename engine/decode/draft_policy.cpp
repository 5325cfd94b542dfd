#include "decode/draft_policy.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace sbd {
namespace {

constexpr std::array kSizes = {2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32};

// Until something is known: that a guess agrees, and the forwards beyond the first that it takes.
constexpr double kExpectedAgreement = 0.85;
constexpr std::array kExpectedRefinement = {0.0, 0.1, 0.2, 0.3};

// What counts how many drafts' worth: that expectation, one that was measured, and all texts'
// beside the text's own: whether a guess agrees has a variance of up to 1/4, and the agreement of
// texts one of about 1/32.
constexpr double kOfNothing = 2;
constexpr double kOfFile = 8;
constexpr double kOfAllTexts = 8;
constexpr float kRememberedInText = 0.92f;
constexpr float kRememberedInAll = 0.99f;

// Drafts that are tried again: what agreement is hoped for, and their size if that would pay.
constexpr double kHoped = 0.9;
constexpr int kTried = 2;

// A draft has to promise that much more than none: estimates are off by a few per cent. What rows
// add to a shared forward is a difference of two of them, whose noise is that of the whole forward,
// not of a sequence's part: the most promising of many drafts is mostly the one it flatters.
constexpr double kWorthwhile = 1.04;
constexpr double kMaxWorthwhile = 2;
// Rounds until the choice is looked at again. Doing so takes microseconds, a small model's forward
// some tens of them.
constexpr int kRoundsOfNone = 16;
constexpr int kRoundsOfDrafts = 4;
// Forwards after which the time of one without drafts is looked at again, and the rounds it takes
// to get there: a draft under way is verified first.
constexpr int kRefresh = 64;
constexpr int kRefreshing = 2;
constexpr int kMaxNever = 10;
// What rows cost once, which is known, is more than a look at them takes if they are worth one: it
// may be so many times what there is to be spent.
constexpr double kOverpriced = 6;
// Rounds between two looks at what else might be better.
constexpr int kExplore = 16;

}  // namespace

DraftOption best_draft(const std::function<double(int rows)>& ms, int most, int max_rows,
                       const std::function<double(int slot)>& agreement, double refinement,
                       bool known) {
  DraftOption best;
  double reached = 1, kept = 0;  // chance of all slots so far, and the guesses expected to be kept
  int slot = 0;
  for (const int size : kSizes) {
    if (size > most || size > max_rows) break;
    while (slot < size - 1) {
      reached *= agreement(++slot);
      kept += reached;
    }
    const auto consider = [&](Begins begins, double tokens, double time) {
      const DraftOption option{{.size = size, .begins = begins}, tokens, time};
      if (best.ms == 0 || option.rate() > best.rate()) best = option;
    };
    const double block = ms(size);
    const double refined = refinement * (size - 1) * block;
    if (known) {
      consider(Begins::fused, 1 + kept, 2 * block + refined);
      continue;
    }
    const double begins = ms(1 + size);  // behind the one token that is known
    consider(Begins::alone, 2 + kept, block + begins + refined);
    if (2 * size > max_rows) continue;
    consider(Begins::fused, 2 + kept - reached, ms(2 * size) + (1 - reached) * begins + refined);
    const int every = Draft{.size = size, .begins = Begins::every}.rows();
    if (every <= max_rows) consider(Begins::every, 1 + kept, ms(every) + refined);
  }
  return best;
}

void DraftCounts::record(int guesses, int forwards, int kept, float remembered) {
  for (std::size_t i = 0; i < offered_.size(); ++i) {
    offered_[i] *= remembered;
    kept_[i] *= remembered;
  }
  guesses_ = guesses_ * remembered + static_cast<float>(guesses);
  more_forwards_ = more_forwards_ * remembered + static_cast<float>(forwards - 1);
  // Behind the first that did not agree nothing says whether one would have.
  for (int slot = 1; slot <= std::min({guesses, kept + 1, kMaxDraft - 1}); ++slot) {
    offered_[static_cast<std::size_t>(slot)] += 1;
    kept_[static_cast<std::size_t>(slot)] += slot <= kept ? 1 : 0;
  }
}

double DraftCounts::agreement(int slot, double expected, double weight) const {
  const auto at = static_cast<std::size_t>(slot);
  return (kept_[at] + weight * expected) / (offered_[at] + weight);
}

double DraftCounts::refinement(double expected, double weight) const {
  return (more_forwards_ + weight * expected) / (guesses_ + weight);
}

DraftHistory::Counts& DraftHistory::of(bool known, float temperature) {
  const int warmth = temperature == 0 ? 0 : 1 + static_cast<int>(std::min(temperature * 2, 3.0f));
  return counts_[static_cast<std::size_t>(warmth + (known ? 5 : 0))];
}

double DraftHistory::agreement(bool known, const DraftCounts& counts, int slot,
                               double before) const {
  const std::vector<float>& prior = known ? priors_.known : priors_.fused;
  const auto at = static_cast<std::size_t>(slot);
  if (at < prior.size()) return counts.agreement(slot, prior[at], kOfFile);
  return counts.agreement(slot, before, kOfNothing);
}

bool DraftHistory::afford(double forwards, bool costs_are_doubted) {
  if (forwards > (costs_are_doubted ? kOverpriced : 1) * credit_) return false;
  credit_ -= std::clamp(forwards, 0.0, credit_);
  return true;
}

void DraftHistory::made(int tokens) {
  since_look_ = std::min(since_look_ + 1, kExplore);
  earn(share_ * tokens);
}

int DraftHistory::turn_to_explore() {
  if (since_look_ < kExplore) return 0;
  since_look_ = 0;
  turn_ = turn_ % (2 * static_cast<int>(kBoldness.size())) + 1;
  return turn_;
}

void DraftHistory::tried(double gained) {
  earn(gained);
  share_ = gained > 0 ? std::min(2 * share_, kMostShare) : std::max(share_ / 2, kLeastShare);
}

void DraftHistory::earn(double forwards) { credit_ = std::min(credit_ + forwards, kMaxCredit); }

DraftPolicy::DraftPolicy(Draft start, bool rule_kept, bool known, float temperature,
                         std::shared_ptr<DraftHistory> history)
    : fixed_(false),
      start_(start),
      rule_kept_(rule_kept),
      known_(known),
      temperature_(temperature),
      history_(std::move(history)),
      chosen_(start),
      refreshed_(-kRefresh) {}

Draft DraftPolicy::choose(const RowPrice& price, int most) const {
  Draft draft = start_;
  if (!fixed_ && price.costs != nullptr && price.costs->max_rows() > 0) {
    if (rounds_ >= until_) chosen_ = decide(price, most);
    draft = chosen_;
  } else if (!fixed_ && price.sequences > 1) {
    draft = {};  // many guesses at once, and nothing is known of them
  }
  if (!fixed_) draft.size = std::min(draft.size, most);
  return draft;
}

void DraftPolicy::ran(int tokens) {
  if (fixed_) return;
  ++rounds_;
  history_->made(tokens);
}

void DraftPolicy::verified(const Draft& draft, int guesses, int forwards, int kept) {
  if (fixed_) return;
  const auto at = static_cast<std::size_t>(draft.boldness);
  counts_[at].record(guesses, forwards, kept, kRememberedInText);
  history_->of(known_, temperature_)[at].record(guesses, forwards, kept, kRememberedInAll);
  if (draft.tried > 0) {
    history_->tried(std::max(0.0, (kept + 2) / draft.tried - 2));
    until_ = rounds_;  // whether it was worth it
  }
}

DraftOption DraftPolicy::best(const RowPrice& price, int most, Hope hope, int boldness,
                              int most_rows) const {
  const DraftHistory::Counts& all = history_->of(known_, temperature_);
  const auto b = static_cast<std::size_t>(boldness);
  double in_all = kExpectedAgreement;
  const auto agreement = [&](int slot) {
    in_all = history_->agreement(known_, all[b], slot, in_all);
    const double agrees = counts_[b].agreement(slot, in_all, kOfAllTexts);
    return hope == Hope::drafts_agree ? std::max(agrees, kHoped) : agrees;
  };
  const auto ms = [&](int rows) {
    if (hope == Hope::costs_less) return price.least_ms(rows, ForwardCosts::Known::of_late);
    if (hope == Hope::costs_were_less) return price.least_ms(rows, ForwardCosts::Known::for_sure);
    return price.ms(rows);
  };
  // Step by step: how far a forward grows beyond what has run nobody knows.
  const int max_rows = std::min(most_rows, std::max(2 * price.costs->max_rows() - price.others, 2));
  const double refinement =
      counts_[b].refinement(all[b].refinement(kExpectedRefinement[b], kOfNothing), kOfAllTexts);
  DraftOption option = best_draft(ms, most, max_rows, agreement, refinement, known_);
  option.draft.boldness = boldness;
  return option;
}

Draft DraftPolicy::decide(const RowPrice& price, int most) const {
  const int age = price.costs->age(price.sequences);
  // Of forwards of so few rows nothing is known: beside others that draft, perhaps never.
  const bool first = age == ForwardCosts::kNever && never_ < kMaxNever;
  if (first || (age > kRefresh && rounds_ - refreshed_ >= kRefresh)) {
    never_ += first ? 1 : 0;
    refreshed_ = rounds_;
    until_ = rounds_ + kRefreshing;
    return {};
  }
  const double worthwhile =
      std::min(kMaxWorthwhile, kWorthwhile + price.costs->noise() * (price.sequences - 1));
  const DraftOption none{{}, 1, price.ms(1)};
  DraftOption best = none;
  const auto consider = [&](const DraftOption& option, double worth) {
    if (option.ms > 0 && option.rate() > worth * best.rate()) best = option;
  };
  for (int boldness = 0; boldness < static_cast<int>(kBoldness.size()); ++boldness) {
    if (rule_kept_ && boldness != start_.boldness) continue;
    consider(this->best(price, most, Hope::none, boldness), best.draft.size == 1 ? worthwhile : 1);
  }
  until_ = rounds_ + (best.draft.size == 1 ? kRoundsOfNone : kRoundsOfDrafts);
  if (best.draft.size == 1) return try_again(price, most, none, worthwhile);
  if (const int turn = history_->turn_to_explore()) return explore(price, most, best, turn);
  return best.draft;
}

// A draft where none is worth it, as long as one would be if it agreed, or if its rows did not cost
// what they did when they were last looked at: a small one, which tells about as much in less time.
Draft DraftPolicy::try_again(const RowPrice& price, int most, const DraftOption& none,
                             double worth) const {
  if (history_->credit() < 1) return none.draft;
  const double to_be_worth = worth / kWorthwhile;
  for (const Hope hope : {Hope::drafts_agree, Hope::costs_were_less}) {
    const bool costs = hope == Hope::costs_were_less;
    for (int doubled = kTried; doubled < 2 * std::min(most, kMaxDraft); doubled *= 2) {
      const int limit = std::min(most, doubled);
      if (costs && !price.costs->doubtful(price.others + limit)) continue;
      const DraftOption hoped = best(price, limit, hope, start_.boldness);
      if (hoped.ms == 0 || hoped.rate() < (costs ? worth : kWorthwhile) * none.rate()) continue;
      // For the two forwards, if all of it agrees.
      if (hoped.draft.size + 1 <= 2 * to_be_worth) continue;
      const int size = costs ? limit : hoped.draft.size;
      const int begins = known_ ? size : size + 1;
      double forwards = (price.ms(size) + price.ms(begins)) / none.ms;
      if (costs) forwards = std::min(forwards, double(size + begins));  // a row after the other
      if (!history_->afford(forwards - (known_ ? 1 : 2), costs)) return none.draft;
      // It begins in this round and is verified in the next, or, behind a known token, in this.
      until_ = rounds_ + (known_ ? 1 : 2);
      return {.size = size,
              .boldness = hoped.draft.boldness,
              .begins = Begins::alone,
              .tried = costs ? 0 : to_be_worth};
    }
  }
  return none.draft;
}

// Another boldness, or rows whose time nobody knows.
Draft DraftPolicy::explore(const RowPrice& price, int most, const DraftOption& best,
                           int turn) const {
  const bool costs = rule_kept_ || turn % 2 == 0;
  const int boldness = costs ? best.draft.boldness : turn / 2 % static_cast<int>(kBoldness.size());
  if (!costs && boldness == best.draft.boldness) return best.draft;
  // Step by step, in drafts and in rows.
  if (costs) most = std::min(most, 2 * best.draft.size);
  const int most_rows = costs ? 2 * best.draft.rows() : kAnyRows;
  DraftOption hoped =
      this->best(price, most, costs ? Hope::costs_less : Hope::drafts_agree, boldness, most_rows);
  if (hoped.ms == 0 || hoped.rate() < kWorthwhile * best.rate()) return best.draft;
  // What it takes with nothing gained; or, of what is known to agree, with what was measured once.
  const double ms = price.ms(hoped.draft.rows());
  const double in_vain = std::max(0.0, ms * best.rate() - (costs ? hoped.tokens : 1));
  if (!history_->afford(in_vain, costs)) return best.draft;
  hoped.draft.tried = costs ? 0 : 1;
  until_ = rounds_ + 1;
  return hoped.draft;
}

}  // namespace sbd
