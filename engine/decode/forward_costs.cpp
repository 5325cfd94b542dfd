#include "decode/forward_costs.h"

#include <algorithm>
#include <cmath>

namespace sbd {

// The nearest one, in ratio.
std::size_t ForwardCosts::place(int rows) {
  std::size_t i = 0;
  while (i + 1 < kRows.size() && double(rows) * rows > kRows[i] * kRows[i + 1]) ++i;
  return i;
}

namespace {

constexpr int kOld = 256;  // what was so many forwards ago counts no more
constexpr int kLongAgo = 1 << 13;
constexpr int kFew = 2;  // may all have been interrupted

}  // namespace

void ForwardCosts::record(int rows, double ms) {
  Measured& place = measured_[ForwardCosts::place(rows)];
  max_rows_ = std::max(max_rows_, rows);
  constexpr int kSteady = 5;  // from then on the newest one has a fifth of the weight
  if (age(rows) > kOld) place.times = 0;
  place.last = ++recorded_;
  place.times = std::min(place.times + 1, kSteady);
  // One that was interrupted says little: it counts as twice the usual at most, and where others
  // take less than half of it, not at all.
  if (place.times > 1 && place.ms > 2 * ms) place.times = 1;
  if (place.times > 1) {
    ms = std::min(ms, 2 * place.ms);
    constexpr double kNewest = 1.0 / 32;
    noise_ += kNewest * (std::abs(ms / place.ms - 1) - noise_);
  }
  place.rows += (rows - place.rows) / place.times;
  place.ms += (ms - place.ms) / place.times;
}

int ForwardCosts::age(int rows) const {
  const Measured& measured = measured_[place(rows)];
  const std::int64_t since = recorded_ - measured.last;
  return measured.times == 0 ? kNever : static_cast<int>(std::min<std::int64_t>(since, kNever - 1));
}

double ForwardCosts::ms(int rows) const {
  const Measured* below = nullptr;
  const Measured* lower = nullptr;  // the one below that
  const Measured* above = nullptr;
  for (const Measured& place : measured_) {
    if (place.times == 0) continue;
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

bool ForwardCosts::doubtful(int rows) const {
  const Measured& measured = measured_[place(rows)];
  const int since = age(rows);
  return since != kNever && (since > kLongAgo || (since <= kOld && measured.times <= kFew));
}

double ForwardCosts::least_ms(int rows, Known known) const {
  const bool sure = known == Known::for_sure;
  double least = 0;
  for (const Measured& place : measured_) {
    if (place.times <= (sure ? kFew : 0)) continue;
    if (recorded_ - place.last > (sure ? kLongAgo : kOld)) continue;
    if (place.rows <= rows) least = place.ms;
  }
  return least == 0 ? ms(rows) : least;
}

double RowPrice::ms(int rows) const { return part(costs->ms(others + rows)); }

double RowPrice::least_ms(int rows, ForwardCosts::Known known) const {
  return part(costs->least_ms(others + rows, known));
}

double RowPrice::part(double forward_ms) const {
  return costs->ms(sequences) / sequences + std::max(0.0, forward_ms - costs->ms(others + 1));
}

}  // namespace sbd
