// A fake model behind a KV cache, whose statistics depend on every token a row sees: a wrong token,
// row, order or count in any plan gives another text.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "scripted.h"

namespace sbd::test {

// Stands for a model: statistics that are a pure function of all tokens a row sees and of its
// position. Entropies are spread so that every rule has something to choose.
RowStats fake_row(std::span<const TokenId> visible, int position, const Sampling& sampling);

struct Outcome {
  Tokens tokens;
  int nfe = 0;
  FinishReason finished = FinishReason::length;
  int most_accepted = 0;  // tokens by one verifying forward
  int branches = 0;       // segments that go on from within others
};

inline bool contains(const Tokens& tokens, TokenId token) {
  return std::ranges::find(tokens, token) != tokens.end();
}

// As fake_row, but most tokens are a function of the place they stand at, which a causal row
// (predicting the next one) and a mask agree on: drafts that can be right.
// Above temperature 0 the noise of that place has its say too.
RowStats agreeing_row(std::span<const TokenId> visible, int position, const Segment& segment);

// The next token, in a circle, that the row's rules allow.
void follow_rules(const RowAsk& ask, RowStats& stats);

// Runs a decoder whose rows all go through all layers, and holds it to what a plan promises. With
// costs it is told what rows cost: anything, and something else all the time.
Outcome run(Decoder& decoder, const DecodeTask& task, bool agreeing = false, int max_rows = 512,
            ForwardCosts* costs = nullptr);

void check_same(const Outcome& actual, const Outcome& expected);

}  // namespace sbd::test
