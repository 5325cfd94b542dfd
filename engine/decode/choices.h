// Texts that are one of some: each is its tokens, as the tokenizer splits the whole of it.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "decode/constraint.h"

namespace sbd {

class Choices final : public Grammar {
 public:
  // Refuses none at all, one without tokens, and tokens outside the vocabulary.
  Choices(std::vector<std::vector<TokenId>> texts, int vocab_size,
          std::vector<TokenId> eos_token_ids);

  std::string_view name() const override { return "choices"; }
  int vocab_size() const override { return all_->vocab_size; }
  std::unique_ptr<Constraint> begin() const override;

 private:
  struct All {
    std::vector<std::vector<TokenId>> texts;  // ascending: those that begin alike are neighbours
    int vocab_size;
    std::vector<TokenId> eos_token_ids;
  };
  class Chosen;

  std::shared_ptr<const All> all_;
};

}  // namespace sbd
