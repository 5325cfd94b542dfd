#include "decode/forward_costs.h"

#include <algorithm>
#include <cmath>

namespace sbd {

void ForwardCosts::record(int rows, double ms) {
  const auto nearest = std::ranges::min_element(
      kRows, {}, [rows](int count) { return std::abs(std::log(double(count) / rows)); });
  Measured& place = measured_[static_cast<std::size_t>(nearest - kRows.begin())];
  max_rows_ = std::max(max_rows_, rows);
  if (place.ms == 0) {
    place = {static_cast<double>(rows), ms};
    return;
  }
  constexpr double kNew = 0.2;  // the newest one's share
  place.rows += kNew * (rows - place.rows);
  // One that was interrupted says little: it counts as twice the usual at most.
  place.ms += kNew * (std::min(ms, 2 * place.ms) - place.ms);
}

double ForwardCosts::ms(int rows) const {
  const Measured* below = nullptr;
  const Measured* lower = nullptr;  // the one below that
  const Measured* above = nullptr;
  for (const Measured& place : measured_) {
    if (place.ms == 0) continue;
    if (place.rows > rows) {
      above = &place;
      break;
    }
    lower = below;
    below = &place;
  }
  if (below == nullptr) return above == nullptr ? 0 : above->ms;
  if (above == nullptr) {
    if (lower == nullptr) return below->ms;
    const double slope = std::max(0.0, (below->ms - lower->ms) / (below->rows - lower->rows));
    return below->ms + slope * (rows - below->rows);
  }
  const double share = (rows - below->rows) / (above->rows - below->rows);
  return below->ms + share * (above->ms - below->ms);
}

}  // namespace sbd
