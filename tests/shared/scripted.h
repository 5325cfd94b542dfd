// Decoders without a model: tasks, statistics to drive them with, plans and events as text.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "decode/decoder.h"
#include "decode/unmask.h"

namespace sbd::test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr TokenId kMask = 99;
inline constexpr TokenId kEos = 7;
using Tokens = std::vector<TokenId>;

inline DecodeTask task(const Tokens& prompt, int max_tokens) {
  return {.prompt = prompt,
          .max_tokens = max_tokens,
          .n_ctx = 100,
          .eos_token_ids = {kEos},
          .sampling = {}};
}

inline Unmask gamma(float value) { return {.gamma = value}; }
inline Unmask confidence(float threshold) {
  return {.rule = UnmaskRule::confidence, .confidence_threshold = threshold};
}
inline Unmask top_n(int n) { return {.rule = UnmaskRule::top_n, .top_n = n}; }

// A row that decides `token` at temperature 0 and token + 100 above it.
inline RowStats row(TokenId token, float entropy = 1.0f) {
  return {.argmax = token,
          .top_probability = std::exp(-entropy),
          .entropy = entropy,
          .sampled = token + 100};
}

// The same by its probability.
inline RowStats likely(TokenId token, float probability) {
  return {.argmax = token, .top_probability = probability, .sampled = token + 100};
}

// "[1 2 3 causal commit] [_ 5 _ block scratch > 0 2]": tokens, and the rows wanted behind ">". In
// front stands where the rows start, if the plan or a segment says it ("at 4 "), and behind a
// segment's tokens what it does with the layers, if not the usual.
inline std::string text(const Plan& plan) {
  std::string out = plan.start ? "at " + std::to_string(*plan.start) + " " : "";
  for (const Segment& segment : plan.segments) {
    out += &segment == plan.segments.data() ? "[" : " [";
    if (segment.begin) out += "at " + std::to_string(*segment.begin) + " ";
    for (const TokenId token : segment.tokens) {
      out += (token == kMask ? "_" : std::to_string(token)) + " ";
    }
    if (segment.layers == Layers::refill) out += "refill ";
    if (segment.layers == Layers::skip) out += "skip ";
    if (segment.e_factor == 1 && segment.h_factor == 1) out += "e+h ";
    if (segment.e_factor == 1 && segment.h_factor == 0) out += "e ";
    if (segment.adapted) out += "adapted ";
    out += segment.attention == Attention::causal ? "causal " : "block ";
    out += segment.kv == Kv::commit ? "commit" : "scratch";
    out += segment.outputs.empty() ? "" : " >";
    for (const int output : segment.outputs) {
      out += " " + std::to_string(output);
    }
    out += "]";
  }
  return out;
}

// "0:4 2:6 | 4 | stop": revealed, committed, finished; then "accepted 2" and "thinking".
inline std::string text(const Events& events) {
  std::string out;
  for (const Reveal& reveal : events.revealed) {
    out += std::to_string(reveal.position) + ":" + std::to_string(reveal.token) + " ";
  }
  out += "|";
  for (const TokenId token : events.committed) {
    out += " " + std::to_string(token);
  }
  out += " |";
  if (events.finished) {
    const bool complete = *events.finished == FinishReason::complete;
    out += *events.finished == FinishReason::stop ? " stop" : complete ? " complete" : " length";
  }
  if (events.accepted) out += " accepted " + std::to_string(*events.accepted);
  if (events.ran_thinking) out += " thinking";
  return out;
}

// Of the forward that has `rows` rows for it.
inline std::string absorb(Decoder& decoder, const std::vector<RowStats>& stats, int rows = 512) {
  return text(decoder.absorb(decoder.plan({rows}), stats));
}

// How the rows of the last segment are drawn.
inline Sampling last_sampling(Decoder& decoder) {
  return decoder.plan({}).segments.back().sampling;
}

}  // namespace sbd::test
