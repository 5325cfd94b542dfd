// Next-token prediction: causal attention, one token per forward.
#pragma once

#include "decode/decoder.h"

namespace sbd {

class NtpDecoder final : public Decoder {
 public:
  explicit NtpDecoder(DecodeTask task);

  Sharing sharing() const override;
  void begin_behind(int n_cached) override;
  int most_positions() const override { return task_.most_positions(1); }
  Demand demand() const override;
  Plan plan(const Budget& budget) const override;
  Events absorb(const Plan& plan, std::span<const RowStats> stats) override;

 private:
  DecodeTask task_;
  TextRules rules_;
  std::vector<TokenId> pending_;  // tokens the KV cache lacks: the prompt, then the newest ones
  bool prompt_pending_ = true;
  int decided_ = 0;  // new tokens
  Events opening_;   // what the text begins with, whatever the model says
};

}  // namespace sbd
