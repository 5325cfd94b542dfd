// Requests whose numbers lie at the ends of their types: each is refused in one line, or gives
// tokens of the vocabulary, and one that shares its forwards has the text that it has alone.
#include <array>
#include <climits>
#include <cmath>
#include <limits>

#include "check.h"
#include "complete_model.h"
#include "core/random.h"
#include "decode/options.h"
#include "engine.h"

namespace sbd {
namespace {

using namespace test;
using Tokens = std::vector<TokenId>;

constexpr int kContext = 48;
constexpr int kMostSteps = 400;
constexpr float kMost = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::array kNumbers = {0.0f,   -0.0f, 1.0f,  -1.0f,     2.0f,       1e-45f,
                                 1e-30f, 1e30f, kMost, -kMost,    kInfinity,  -kInfinity,
                                 NAN,    0.5f,  0.99f, 0.999999f, 1.0000001f, -2.0f};
constexpr std::array kIntegers = {0, 1, 2, 3, 16, 47, 48, 1024, 1025, INT_MAX, INT_MIN, -1};

// Allows one token or, where that is -1, all, a mask too; the last is the end of sequence, which is
// no part of a text.
class Only : public Constraint {
 public:
  Only(TokenId token, int vocab_size)
      : allowed_(static_cast<std::size_t>(vocab_size + 31) / 32), end_(vocab_size - 1) {
    for (TokenId each = 0; each < vocab_size; ++each) {
      if (token < 0 || each == token) insert(allowed_, each);
    }
  }

  TokenSet allowed() override { return allowed_; }
  bool consume(TokenId token) override { return token != end_ && contains(allowed_, token); }
  void roll_back(int) override {}
  Tokens forced() override { return {}; }
  bool ended() override { return false; }

 private:
  TokenSet allowed_;
  TokenId end_;
};

class OnlyGrammar : public Grammar {
 public:
  OnlyGrammar(TokenId token, int vocab_size) : token_(token), vocab_size_(vocab_size) {}

  std::string_view name() const override { return "grammar"; }
  int vocab_size() const override { return vocab_size_; }
  std::unique_ptr<Constraint> begin() const override {
    return std::make_unique<Only>(token_, vocab_size_);
  }

 private:
  TokenId token_;
  int vocab_size_;
};

class RandomFields {
 public:
  explicit RandomFields(std::uint64_t seed) : seed_(seed) {}

  std::size_t below(std::size_t n) { return mix64(combine(seed_, count_++)) % n; }
  bool one_in(std::size_t n) { return below(n) == 0; }
  template <typename Values>
  auto of(const Values& values) {
    return values[below(std::size(values))];
  }

 private:
  std::uint64_t seed_;
  std::uint64_t count_ = 0;
};

OptionValue option_value(RandomFields& draws, const Option& option) {
  if (option.type == OptionType::name) {
    return draws.one_in(10) ? std::string("none") : std::string(draws.of(option.choices()));
  }
  if (option.type == OptionType::integer) return draws.of(kIntegers);
  return draws.of(kNumbers);
}

Request extreme(RandomFields& draws, int vocab_size, const std::vector<std::string>& decoders) {
  Request request;
  const std::array<TokenId, 4> ids = {0, vocab_size - 1, vocab_size, INT_MIN};
  const std::array<int, 5> lengths = {1, 5, kContext - 1, kContext, 0};
  const std::size_t n_ids = draws.one_in(20) ? 4 : 2;
  const auto token = [&] { return ids[draws.below(n_ids)]; };
  const int n_prompt = lengths[draws.below(draws.one_in(10) ? 5 : 3)];
  for (int i = 0; i < n_prompt; ++i) request.prompt.push_back(token());
  request.max_tokens = draws.one_in(4) ? draws.of(kIntegers) : 7;
  if (!draws.one_in(4)) request.decoder = draws.of(draws.one_in(20) ? decoder_names() : decoders);
  const auto maybe = [&](auto& field, const auto& values) {
    if (draws.one_in(14)) field = draws.of(values);
  };
  maybe(request.temperature, kNumbers);
  maybe(request.top_p, kNumbers);
  maybe(request.top_k, kIntegers);
  maybe(request.min_p, kNumbers);
  maybe(request.presence_penalty, kNumbers);
  maybe(request.frequency_penalty, kNumbers);
  maybe(request.repetition_penalty, kNumbers);
  maybe(request.logprobs, kIntegers);
  request.seed = draws.one_in(3) ? ~std::uint64_t{0} : 0;
  request.sample_index = draws.one_in(3) ? ~std::uint64_t{0} : 0;
  if (draws.one_in(4)) {
    const float bias = draws.of(kNumbers);
    for (TokenId id = 0; id < vocab_size; ++id) request.logit_bias.emplace_back(id, bias);
    if (draws.one_in(4)) request.logit_bias.emplace_back(token(), draws.of(kNumbers));
  }
  if (draws.one_in(5)) {
    const std::array<TokenId, 3> allowed = {0, vocab_size - 2, -1};  // the mask is often the second
    const int size = draws.one_in(8) ? draws.of(kIntegers) : vocab_size;
    if (size >= 0 && size <= 1 << 16) {
      request.grammar = std::make_shared<OnlyGrammar>(draws.of(allowed), size);
    }
  }
  request.ignore_eos = draws.one_in(2) && (!request.grammar || draws.one_in(20));
  for (const Option& option : all_options()) {
    if (draws.one_in(30)) request.options[std::string(option.name)] = option_value(draws, option);
  }
  return request;
}

TEST(extreme_requests_beside_a_plain_one) {
  int n_refused = 0, n_failed = 0, n_done = 0;
  std::uint64_t seed = 0;
  for (const ModelShape& shape : complete_models()) {
    const MemoryFile file(complete_model(shape).build());
    Engine engine(file.path(), {.n_threads = 1, .n_ctx = kContext, .kv_budget = 1 << 22});
    const int vocab_size = engine.config().vocab_size;
    Request plain;
    plain.prompt = {0, 1};
    plain.max_tokens = 4;
    plain.decoder = "ntp";
    plain.ignore_eos = true;
    Tokens expected;
    for (int round = 0; round < 500; ++round) {
      RandomFields draws(++seed);
      const SequenceId beside = engine.add(plain);
      std::optional<SequenceId> id;
      const Request request = extreme(draws, vocab_size, engine.decoders());
      try {
        id = engine.add(request);
      } catch (const Error& error) {
        CHECK(std::string_view(error.what()).find('\n') == std::string_view::npos);
        ++n_refused;
      }
      Tokens text;
      bool running = true, failed = false;
      for (int step = 0; step < kMostSteps && running; ++step) {
        const std::vector<SequenceEvents> happened = engine.step();
        running = !happened.empty();
        for (const SequenceEvents& one : happened) {
          if (one.id == beside) {
            CHECK(one.error.empty());
            text.insert(text.end(), one.events.committed.begin(), one.events.committed.end());
            continue;
          }
          failed = failed || !one.error.empty();
          for (const TokenId token : one.events.committed) CHECK(token >= 0 && token < vocab_size);
        }
      }
      CHECK(!running);
      if (id) ++(failed ? n_failed : n_done);
      if (expected.empty()) expected = text;
      CHECK_EQ(text, expected);
    }
  }
  CHECK(n_refused > 1000);
  CHECK(n_done > 1000);
}

}  // namespace
}  // namespace sbd
