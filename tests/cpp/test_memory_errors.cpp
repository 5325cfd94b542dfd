// Whatever allocation of a step fails: some sequences end with an error, all others have the text
// that they have alone, and the engine goes on as if nothing had been.
#include <map>
#include <new>

#include "check.h"
#include "complete_model.h"
#include "engine.h"
#include "failing_allocations.h"
#include "loop.h"

namespace sbd {
namespace {

using namespace test;
using Tokens = std::vector<TokenId>;

Request request(const char* decoder, int n_prompt, int max_tokens) {
  Request request;
  for (int i = 0; i < n_prompt; ++i) request.prompt.push_back(i % 5);
  request.max_tokens = max_tokens;
  request.decoder = decoder;
  request.ignore_eos = true;
  return request;
}

// Of several kinds; the last begins as the first does, so that it may take over what that leaves.
std::vector<Request> requests() {
  Request sampled = request("ntp", 3, 6);
  sampled.temperature = 1;
  sampled.top_p = 0.9f;
  sampled.logprobs = 2;
  sampled.presence_penalty = 0.5f;
  Request biased = request("sbd", 9, 7);
  biased.logit_bias = {{1, 0.5f}, {4, -1.0f}};
  return {request("ntp", 40, 5), sampled, biased, request("sbd_lossless", 5, 6),
          request("ntp", 38, 4)};
}

EngineOptions options() { return {.n_threads = 1, .n_ctx = 64, .kv_budget = 1 << 20}; }

struct Text {
  Tokens tokens;
  bool finished = false;
  bool failed = false;
};

void add_to(Text& text, const Events& events, bool error) {
  text.tokens.insert(text.tokens.end(), events.committed.begin(), events.committed.end());
  text.finished = text.finished || events.finished.has_value();
  text.failed = text.failed || error;
}

Tokens alone(const MemoryFile& file, const Request& request) {
  Engine engine(file.path(), options());
  engine.add(request);
  Text text;
  while (!text.finished) add_to(text, engine.step()[0].events, false);
  return text.tokens;
}

std::vector<Tokens> alone(const MemoryFile& file) {
  std::vector<Tokens> texts;
  for (const Request& each : requests()) texts.push_back(alone(file, each));
  return texts;
}

void check_texts(const std::map<SequenceId, Text>& texts, SequenceId first,
                 const std::vector<Tokens>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const Text& text = texts.at(first + static_cast<SequenceId>(i));
    CHECK(text.finished != text.failed);
    if (text.finished) CHECK_EQ(text.tokens, expected[i]);
  }
}

// One engine for all failures: what each leaves behind meets the next. Its cache has room for these
// sequences and no more, so that one that is not given back is missed.
TEST(memory_errors_in_any_allocation_of_a_step) {
  const MemoryFile file(complete_model(complete_models()[0]).build());
  const std::vector<Tokens> expected = alone(file);
  Engine engine(file.path(), options());
  std::size_t n_failures = 0;
  for (const bool persistent : {false, true}) {
    for (int at_step = 0; at_step < 6; ++at_step) {
      bool reached = true;
      for (long n = 0; reached; n += 1 + n / 16) {
        std::map<SequenceId, Text> texts;
        SequenceId first = 0;
        for (const Request& each : requests()) {
          const SequenceId id = engine.add(each);
          if (first == 0) first = id;
          texts[id] = {};
        }
        std::vector<SequenceEvents> happened;
        for (int step = 0; step < 200; ++step) {
          bool all = false;
          const auto take_step = [&] {
            try {
              happened = engine.step();
            } catch (const std::bad_alloc&) {
              all = true;
            }
          };
          if (step == at_step) {
            const FailingAllocations failing(n, persistent);
            take_step();
            reached = failing.failed();
          } else {
            take_step();
          }
          if (all) {
            CHECK_EQ(step, at_step);
            for (auto& [id, text] : texts) {
              if (!text.finished) text.failed = true;
              engine.remove(id);
            }
            continue;
          }
          if (happened.empty()) break;
          for (const SequenceEvents& one : happened) {
            add_to(texts[one.id], one.events, !one.error.empty());
          }
        }
        check_texts(texts, first, expected);
        ++n_failures;
      }
    }
  }
  CHECK(n_failures > 100);
}

// The same with whoever waits: each hears how its sequence ended.
TEST(memory_errors_in_a_step_of_a_loop) {
  const MemoryFile file(complete_model(complete_models()[0]).build());
  const std::vector<Tokens> expected = alone(file);
  const auto loop = std::make_shared<Loop>(std::make_unique<Engine>(file.path(), options()));
  for (const bool persistent : {false, true}) {
    for (int at_step = 0; at_step < 4; ++at_step) {
      bool reached = true;
      for (long n = 0; reached; n += 1 + n / 16) {
        Inbox inbox(loop);
        std::map<SequenceId, Text> texts;
        SequenceId first = 0;
        for (const Request& each : requests()) {
          const SequenceId id = inbox.add(each);
          if (first == 0) first = id;
        }
        for (int step = 0; step < 200 && inbox.expects(); ++step) {
          if (step == at_step) {
            const FailingAllocations failing(n, persistent);
            inbox.wait();
            reached = failing.failed();
          } else {
            inbox.wait();
          }
          while (const auto event = inbox.take()) {
            add_to(texts[event->id], event->events, event->error != nullptr);
          }
        }
        CHECK(!inbox.expects());
        CHECK_EQ(loop->n_sequences(), 0);
        check_texts(texts, first, expected);
      }
    }
  }
}

}  // namespace
}  // namespace sbd
