// What forwards cost by their number of rows, learnt from those that ran.
#pragma once

#include <array>

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

 private:
  // Row counts that are kept apart; what lies between two counts for the nearer one.
  static constexpr std::array kRows = {1,  2,  3,  4,  6,   8,   12,  16,  24,
                                       32, 48, 64, 96, 128, 192, 256, 384, 512};
  struct Measured {
    double rows = 0;
    double ms = 0;  // 0: never
  };
  std::array<Measured, kRows.size()> measured_{};
  int max_rows_ = 0;
};

}  // namespace sbd
