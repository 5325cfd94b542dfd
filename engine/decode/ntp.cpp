#include "decode/ntp.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

NtpDecoder::NtpDecoder(DecodeTask task) : task_(std::move(task)), pending_(task_.prompt) {}

int NtpDecoder::chunk_rows() const {
  return std::min(task_.prefill_rows, static_cast<int>(pending_.size()));
}

Plan NtpDecoder::plan() const {
  const int rows = chunk_rows();
  Segment chunk;
  chunk.tokens.assign(pending_.begin(), pending_.begin() + rows);
  chunk.sampling = task_.sampling;
  if (rows == static_cast<int>(pending_.size())) {
    chunk.outputs = {rows - 1};  // row t predicts the token at t + 1
  }
  return {{chunk}};
}

Events NtpDecoder::absorb(std::span<const RowStats> stats) {
  pending_.erase(pending_.begin(), pending_.begin() + chunk_rows());
  const std::size_t wanted = pending_.empty() ? 1 : 0;
  check_rows(stats, wanted);
  if (stats.empty()) {
    return {};
  }
  const TokenId token = task_.choose(stats[0]);
  Events events{
      .revealed = {task_.reveal(decided_, stats[0])}, .committed = {token}, .finished = {}};
  ++decided_;
  pending_ = {token};
  events.finished = task_.finish(token, decided_);
  return events;
}

}  // namespace sbd
