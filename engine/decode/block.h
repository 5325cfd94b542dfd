// A block of the new text on its way from masks to tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "decode/decoder.h"

namespace sbd {

inline constexpr int kBlockSize = 16;  // where nothing says another

class Block {
 public:
  // `size` positions from `begin` on (0 is the first after the prompt), all masked; those from
  // `end` on, counted in the block, are not in the text.
  Block(int begin, int size, int end, TokenId mask_token_id);

  int begin() const { return begin_; }
  int end() const { return end_; }
  int size() const { return static_cast<int>(tokens_.size()); }
  const std::vector<TokenId>& tokens() const { return tokens_; }  // the mask where none is decided
  TokenId operator[](int i) const { return tokens_[static_cast<std::size_t>(i)]; }

  // A mask token in the prompt is a token.
  bool is_masked(int i) const { return begin_ + i >= 0 && (*this)[i] == mask_token_id_; }
  // Masked positions, ascending: those before the end; all that may be text while an end of
  // sequence is not counted; and those that the text does not need too.
  std::vector<int> masked() const;
  std::vector<int> wanted_masked() const;
  std::vector<int> all_masked() const;

  // The token there was known before: a prompt's, which is no event.
  void fill(int i, TokenId token) { tokens_[static_cast<std::size_t>(i)] = token; }
  // What stands from there on is decided anew.
  void mask_from(int i);
  // The text ends there at the latest.
  void cut(int end) { end_ = std::min(end_, end); }
  // Decides a masked position as its row says. An end of sequence becomes the block's end: what was
  // decided behind it is cut.
  void decide(int i, const RowStats& row, const DecodeTask& task, Events& events);
  // Gives out the decided tokens in front of the first mask, as far as they have not been, and the
  // reason where the text ends with them. Whether every position up to the end is decided.
  bool commit(const DecodeTask& task, Events& events);

 private:
  std::vector<int> masked_before(int end) const;

  int begin_;
  int wanted_;  // the end before any end of sequence
  int end_;
  int committed_;  // positions given out
  TokenId mask_token_id_;
  std::vector<TokenId> tokens_;
  std::vector<std::shared_ptr<const RowScores>> scores_;  // of decided positions
};

// The block of `block_size` positions from `begin` on, fewer where the context ends.
Block block_at(const DecodeTask& task, int begin, int block_size, TokenId mask_token_id);

// Refuses a block_size outside 1 to the context.
void check_block_size(int block_size, const DecodeTask& task);

}  // namespace sbd
