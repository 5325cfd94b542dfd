// Next-token prediction: causal attention, one token per forward.
#pragma once

#include "decode/decoder.h"

namespace sbd {

class NtpDecoder final : public Decoder {
 public:
  explicit NtpDecoder(DecodeTask task);

  Plan plan() const override;
  Events absorb(std::span<const RowStats> stats) override;

 private:
  int chunk_rows() const;

  DecodeTask task_;
  std::vector<TokenId> pending_;  // tokens the KV cache lacks: the prompt, then the newest token
  int decided_ = 0;               // new tokens
};

}  // namespace sbd
