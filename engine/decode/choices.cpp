#include "decode/choices.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

// How far a text has come: the choices that begin as it does.
class Choices::Chosen final : public Constraint {
 public:
  explicit Chosen(std::shared_ptr<const All> all)
      : all_(std::move(all)), left_{std::span(all_->texts)} {}

  TokenSet allowed() override {
    TokenSet set((static_cast<std::size_t>(all_->vocab_size) + 31) / 32);
    for (const auto& text : left_.back()) {
      if (text.size() > length()) insert(set, text[length()]);
    }
    if (may_end()) {
      for (const TokenId token : all_->eos_token_ids) insert(set, token);
    }
    return set;
  }

  bool consume(TokenId token) override {
    // A text that ends here is in front of those that go on.
    const auto next = [this](const std::vector<TokenId>& text) {
      return text.size() > length() ? text[length()] : TokenId{-1};
    };
    const auto found = std::ranges::equal_range(left_.back(), token, {}, next);
    if (token < 0 || found.empty()) return false;
    left_.emplace_back(found.begin(), found.end());
    return true;
  }

  void roll_back(int n) override { left_.resize(left_.size() - static_cast<std::size_t>(n)); }

  std::vector<TokenId> forced() override {
    const auto &first = left_.back().front(), &last = left_.back().back();
    const auto [end, _] = std::ranges::mismatch(first, last);
    return {first.begin() + static_cast<std::ptrdiff_t>(length()), end};
  }

  bool ended() override { return may_end() && left_.back().size() == 1; }

 private:
  std::size_t length() const { return left_.size() - 1; }
  bool may_end() const { return left_.back().front().size() == length(); }

  std::shared_ptr<const All> all_;
  std::vector<std::span<const std::vector<TokenId>>> left_;  // behind each token of the text
};

Choices::Choices(std::vector<std::vector<TokenId>> texts, int vocab_size,
                 std::vector<TokenId> eos_token_ids) {
  SBD_CHECK(!texts.empty(), "expected at least one choice, got none");
  const auto check = [&](TokenId token) {
    SBD_CHECK(token >= 0 && token < vocab_size, "token {} is outside {} tokens", token, vocab_size);
  };
  for (const auto& text : texts) {
    SBD_CHECK(!text.empty(), "expected choices of at least one token, got an empty one");
    std::ranges::for_each(text, check);
  }
  std::ranges::for_each(eos_token_ids, check);
  std::ranges::sort(texts);
  const auto again = std::ranges::unique(texts);
  texts.erase(again.begin(), again.end());
  all_ = std::make_shared<const All>(std::move(texts), vocab_size, std::move(eos_token_ids));
}

std::unique_ptr<Constraint> Choices::begin() const { return std::make_unique<Chosen>(all_); }

}  // namespace sbd
