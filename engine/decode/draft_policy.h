// How far a lossless decoder drafts, and how boldly. Nothing here can change a text, so it goes by
// time alone: of all drafts, and of none, the one with the most expected tokens per millisecond.
//
//   none       [token]                                    1 token
//   fused      [draft of k][k masks]                      verifies one draft and begins the next
//   every      [draft of k][k masks] behind each token    that may be the last one to agree
//   alone      [draft of k], then [token][k masks]        the next draft is never in vain
//   known      [draft of k], then [token and k - 1 masks] where that is how the model was trained
//
// How many tokens a draft gains is learnt from those before it, by the slots of a block, from each
// text and, as what its first draft goes by, from all of them. Where drafting does not pay it is
// tried again now and then, for less than a hundredth of the time.
#pragma once

#include <array>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "decode/forward_costs.h"

namespace sbd {

// Where a draft begins, of those with one before it to be verified.
enum class Begins {
  fused,  // in the same forward, behind all of that one
  every,  // in the same forward, behind each token of that one: any may be the last to agree
  alone,  // in the forward after
};

struct Draft {
  int size = 1;      // of the block, whose first token is no guess; 1: no draft
  int boldness = 0;  // of kBoldness: how much is decided at once
  Begins begins = Begins::fused;
  // It was not the best by what is known: to be worth it, it has to be so many times as good as
  // none. 0: no such thing.
  double tried = 0;

  // Of a forward that verifies a draft of this size and begins another; for those that begin
  // alone, two forwards' together.
  int rows() const { return begins == Begins::every ? size + size * size : 2 * size; }
};

// By what the parameters of the unmasking rule are multiplied. The first: all is decided at once.
inline constexpr std::array kBoldness = {std::numeric_limits<float>::infinity(), 4.0f, 1.0f, 0.25f};
inline constexpr int kAsWritten = 2;

inline constexpr int kMaxDraft = 32;  // the largest block that is chosen

// What a draft promises, for the time of its forwards.
struct DraftOption {
  Draft draft;
  double tokens = 1;
  double ms = 0;  // 0: there is none
  double rate() const { return tokens / ms; }
};

// The best draft of no more than `most` positions, whose forwards have no more than `max_rows`.
// `agreement`: the chance that the guess in a slot (1 is the first) agrees where those before it
// do; `refinement`: forwards beyond the first that a guess takes; `known`: it begins with a token
// that is known.
DraftOption best_draft(const std::function<double(int rows)>& ms, int most, int max_rows,
                       const std::function<double(int slot)>& agreement, double refinement,
                       bool known);

// What became of drafts of one boldness.
class DraftCounts {
 public:
  // A draft of so many guesses, decided in so many forwards, agreed for the first `kept`. What was
  // before it counts for a share of it.
  void record(int guesses, int forwards, int kept, float remembered);
  // Chance that the guess in a slot (1 is the first) agrees where all before it have; `expected`
  // counts like so many drafts.
  double agreement(int slot, double expected, double weight) const;
  // Forwards beyond the first that a guess takes.
  double refinement(double expected, double weight) const;

 private:
  std::array<float, kMaxDraft> offered_{};  // by slot
  std::array<float, kMaxDraft> kept_{};
  float guesses_ = 0;
  float more_forwards_ = 0;
};

// What all texts of an engine have learnt, and what they may spend on learning more.
class DraftHistory {
 public:
  using Counts = std::array<DraftCounts, kBoldness.size()>;

  // By slot, the agreement that a file says: of drafts behind a known token, and of others.
  struct Priors {
    std::vector<float> known;
    std::vector<float> fused;
  };
  explicit DraftHistory(Priors priors = {}) : priors_(std::move(priors)) {}
  // The agreement in a slot, by what these counts of all texts say and what was expected of it:
  // what the file says, else the agreement in the slot before.
  double agreement(bool known, const DraftCounts& counts, int slot, double before) const;

  // Of drafts at about this temperature, made one way or the other.
  Counts& of(bool known, float temperature);

  // What there is to be spent on drafts that may be in vain, in forwards of next-token decoding: a
  // share of the time of tokens made, less and less of it where one after the other is in vain.
  double credit() const { return credit_; }
  // Spends what a draft may take in vain, if there is so much. Of what rows cost once, which a look
  // at them may show to be too much, it takes a part.
  bool afford(double forwards, bool costs_are_doubted);
  // A round of a text has made so many tokens.
  void made(int tokens);
  void tried(double gained);

  // Which look at something else it is time for, the first to the last of a round of them; 0: none.
  // Of all texts together, since one alone may be too short for any.
  int turn_to_explore();

 private:
  static constexpr double kMaxCredit = 16;
  static constexpr double kMostShare = 0.006, kLeastShare = kMostShare / 4;
  void earn(double forwards);

  Priors priors_;
  std::array<Counts, 10> counts_{};
  double credit_ = kMaxCredit / 2;
  double share_ = kMostShare;
  int since_look_ = 0;  // rounds of all texts
  int turn_ = 0;
};

// Of one text.
class DraftPolicy {
 public:
  // Always the same.
  explicit DraftPolicy(Draft fixed) : fixed_(true), start_(fixed), chosen_(fixed) {}
  // Begins as `start` says, and learns. `rule_kept`: its boldness is kept.
  DraftPolicy(Draft start, bool rule_kept, bool known, float temperature,
              std::shared_ptr<DraftHistory> history);

  bool fixed() const { return fixed_; }
  // What the next forward does, of at most so many positions. The same until something is told.
  Draft choose(const RowPrice& price, int most) const;
  // What it was, but for how large a draft could be.
  const Draft& chosen() const { return chosen_; }

  // A forward that began or verified a draft, or did without, has committed so many tokens.
  void ran(int tokens);
  // A draft has been verified.
  void verified(const Draft& draft, int guesses, int forwards, int kept);

 private:
  // What is hoped for, of what is not known for sure.
  enum class Hope {
    none,
    drafts_agree,
    costs_less,       // where nothing ran of late
    costs_were_less,  // where nothing is sure
  };

  static constexpr int kAnyRows = std::numeric_limits<int>::max();
  // Of drafts of so many positions, whose forwards have so many rows, at most.
  DraftOption best(const RowPrice& price, int most, Hope hope, int boldness,
                   int most_rows = kAnyRows) const;
  Draft decide(const RowPrice& price, int most) const;
  Draft try_again(const RowPrice& price, int most, const DraftOption& none, double worth) const;
  Draft explore(const RowPrice& price, int most, const DraftOption& best, int turn) const;

  bool fixed_;
  Draft start_;
  bool rule_kept_ = true;
  bool known_ = false;
  float temperature_ = 0;
  std::shared_ptr<DraftHistory> history_;
  DraftHistory::Counts counts_{};
  int rounds_ = 0;
  // What was chosen last, and the round from which it is chosen anew.
  mutable Draft chosen_;
  mutable int until_ = 0;
  mutable int refreshed_ = 0;  // the round in which the cost of no draft was last looked at
  mutable int never_ = 0;      // times that it was not known at all
};

}  // namespace sbd
