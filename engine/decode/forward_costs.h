// What forwards cost by their number of rows, learnt from those that ran.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace sbd {

class ForwardCosts {
 public:
  // A forward of so many rows took so long.
  void record(int rows, double ms);
  // Of the largest one.
  int max_rows() const { return max_rows_; }
  // Estimated milliseconds: between measured row counts by a straight line, beyond them by the last
  // one's. 0 where nothing has been measured.
  double ms(int rows) const;
  // What is known of a forward of no fewer rows: by any that ran of late, or for sure.
  enum class Known { of_late, for_sure };
  double least_ms(int rows, Known known) const;
  // By what share the times of like forwards differ from each other.
  double noise() const { return noise_; }
  // Forwards recorded since one of about so many rows was; kNever where none was.
  static constexpr int kNever = std::numeric_limits<int>::max();
  int age(int rows) const;
  // Whether what was measured of about so many rows is worth a second look, however dear it was: it
  // was once or twice, and those may have been interrupted, or it was long ago.
  bool doubtful(int rows) const;

 private:
  // Row counts that are kept apart; what lies between two counts for the nearer one.
  static constexpr std::array kRows = {1,  2,  3,  4,  6,   8,   12,  16,  24,
                                       32, 48, 64, 96, 128, 192, 256, 384, 512};
  struct Measured {
    double rows = 0;
    double ms = 0;
    int times = 0;          // 0: never
    std::int64_t last = 0;  // which one of all forwards
  };
  static std::size_t place(int rows);

  std::array<Measured, kRows.size()> measured_{};
  int max_rows_ = 0;
  std::int64_t recorded_ = 0;
  double noise_ = 0.05;  // until it is known
};

// What rows cost one sequence of a forward that several share: its part of the forward that has a
// row of each, and all that its other rows add to what the others run.
struct RowPrice {
  const ForwardCosts* costs = nullptr;  // none: nothing is known
  int sequences = 1;                    // this one included
  int others = 0;                       // rows of the others

  double ms(int rows) const;
  // As little as it can be, by what is known.
  double least_ms(int rows, ForwardCosts::Known known) const;

 private:
  // Of a forward that takes so long with all its rows.
  double part(double forward_ms) const;
};

}  // namespace sbd
