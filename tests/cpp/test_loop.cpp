// The engine from many threads: who waits is told at once how its sequence ended, whatever the
// others do. Texts do not depend on company, so each is compared with what the engine alone says.
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <set>
#include <thread>

#include "check.h"
#include "complete_model.h"
#include "core/bell.h"
#include "core/random.h"
#include "loop.h"

namespace sbd {
namespace {

using namespace test;
using namespace std::chrono_literals;

using Tokens = std::vector<TokenId>;

std::shared_ptr<Loop> make_loop(const EngineOptions& options = {.n_threads = 1}) {
  const MemoryFile file(complete_model(complete_models()[0]).build());
  return std::make_shared<Loop>(std::make_unique<Engine>(file.path(), options));
}

Request loop_request(int max_tokens, const char* decoder = "ntp", TokenId first = 0) {
  Request request;
  request.prompt = {first, 1};
  request.max_tokens = max_tokens;
  request.decoder = decoder;
  request.ignore_eos = true;
  return request;
}

// The next event; nothing where none will come.
std::optional<Event> next(Inbox& inbox) {
  while (inbox.expects()) {
    if (auto event = inbox.take()) return event;
    inbox.wait();
  }
  return inbox.take();
}

struct Ending {
  Tokens tokens;
  std::vector<float> logprobs = {};  // of the tokens and of the best beside them
  std::optional<FinishReason> finished = {};
  int cached_tokens = 0;
  std::string error = {};
};

void add_to(Ending& ending, const Events& events) {
  ending.tokens.insert(ending.tokens.end(), events.committed.begin(), events.committed.end());
  for (const auto& scores : events.scores) {
    ending.logprobs.push_back(scores->token.logprob);
    for (const TokenScore& best : scores->best) ending.logprobs.push_back(best.logprob);
  }
  ending.finished = events.finished;
}

void add_to(Ending& ending, const Event& event) {
  add_to(ending, event.events);
  ending.cached_tokens += event.cached_tokens;
  try {
    if (event.error) std::rethrow_exception(event.error);
  } catch (const Error& error) {
    ending.error = error.what();
  }
}

Ending read(Inbox& inbox) {
  Ending ending;
  while (const auto event = next(inbox)) add_to(ending, *event);
  return ending;
}

Ending ending_alone(const Request& request) {
  const auto loop = make_loop();
  return loop->between_forwards([&](Engine& engine) {
    engine.add(request);
    Ending ending;
    while (true) {
      const std::vector<SequenceEvents> happened = engine.step();
      if (happened.empty()) return ending;
      add_to(ending, happened[0].events);
    }
  });
}

Tokens alone(const Request& request) { return ending_alone(request).tokens; }

int living(Loop& loop) {
  return loop.between_forwards(
      [](Engine& engine) { return static_cast<int>(engine.step().size()); });
}

// A thread that is in turn until it is told to end: to others, a forward that takes that long.
class LongForward {
 public:
  explicit LongForward(Loop& loop)
      : thread_([this, &loop] {
          loop.between_forwards([this](Engine&) {
            begun_.set_value();
            end_.get_future().wait();
            return true;
          });
        }) {
    begun_.get_future().wait();
  }
  ~LongForward() {
    end_.set_value();
    thread_.join();
  }

 private:
  std::promise<void> begun_, end_;
  std::thread thread_;
};

bool ready(const auto& future) { return future.wait_for(10s) == std::future_status::ready; }

TEST(loop_gives_the_engines_events) {
  const auto loop = make_loop();
  for (const bool driven : {false, true}) {
    for (const char* decoder : {"ntp", "sbd"}) {
      Inbox inbox(loop, driven);
      inbox.add(loop_request(20, decoder));
      const Ending ending = read(inbox);
      CHECK_EQ(ending.tokens, alone(loop_request(20, decoder)));
      CHECK(ending.finished == FinishReason::length);
      CHECK(!next(inbox));  // and ends
    }
  }
}

TEST(loop_inbox_of_several_sequences) {
  const auto loop = make_loop();
  Inbox inbox(loop);
  std::map<SequenceId, Ending> endings;
  const SequenceId first = inbox.add(loop_request(9));
  const SequenceId second = inbox.add(loop_request(4, "sbd", 3));
  CHECK_EQ(loop->n_sequences(), 2);
  while (const auto event = next(inbox)) add_to(endings[event->id], *event);
  CHECK_EQ(endings[first].tokens, alone(loop_request(9)));
  CHECK_EQ(endings[second].tokens, alone(loop_request(4, "sbd", 3)));
  CHECK_EQ(loop->n_sequences(), 0);
}

TEST(loop_events_gather_until_a_sequence_ends) {
  const auto loop = make_loop();
  Inbox inbox(loop);
  const SequenceId first = inbox.add(loop_request(4));
  const SequenceId second = inbox.add(loop_request(9, "ntp", 3));
  std::map<SequenceId, Ending> endings;
  const auto take_all = [&] {
    int n = 0;
    for (; const auto event = inbox.take(); ++n) add_to(endings[event->id], *event);
    return n;
  };
  inbox.wait(1h);
  CHECK_EQ(loop->n_sequences(), 1);
  CHECK_EQ(take_all(), 8);
  CHECK_EQ(endings[first].tokens, alone(loop_request(4)));
  inbox.wait();
  CHECK_EQ(take_all(), 1);
  inbox.wait(1h);
  CHECK_EQ(take_all(), 4);
  CHECK_EQ(endings[second].tokens, alone(loop_request(9, "ntp", 3)));
}

TEST(loop_a_bell_that_others_rang) {
  Bell bell;
  for (const int others : {0, 1, 63, 200}) {
    for (int i = 0; i < others; ++i) {  // each a child's, which has a copy of it
      if (::fork() == 0) {
        bell.ring();
        ::_exit(0);
      }
    }
    while (::wait(nullptr) > 0) {
    }
    bell.ring();
    bell.hush();
    pollfd rung{.fd = bell.descriptor(), .events = POLLIN, .revents = 0};
    CHECK_EQ(::poll(&rung, 1, 0), 0);
    bell.ring();
    CHECK_EQ(::poll(&rung, 1, 0), 1);
    bell.hush();
  }
}

TEST(loop_bell_rings_until_nothing_is_found) {
  const auto loop = make_loop();
  Inbox inbox(loop, /*driven=*/true), quiet(loop);
  CHECK_EQ(quiet.bell(), -1);
  const auto rings = [&](int ms) {
    pollfd bell{.fd = inbox.bell(), .events = POLLIN, .revents = 0};
    return ::poll(&bell, 1, ms) == 1;
  };
  CHECK(!rings(0));
  for (const bool cancelled : {false, true}) {
    const SequenceId id = inbox.add(loop_request(3));
    if (cancelled) inbox.cancel(id);
    int n_last = 0;
    while (n_last == 0) {
      CHECK(rings(10'000));
      while (const auto event = inbox.take()) {
        CHECK(rings(0));  // more may be there
        n_last += event->last();
      }
    }
    CHECK(!rings(0));
  }
}

TEST(loop_cancel_ends_at_once_who_waits) {
  const auto loop = make_loop();
  for (const bool driven : {false, true}) {
    Inbox inbox(loop, driven);
    Inbox other(loop);
    // A loop that drives itself could be done before the long forward begins.
    SequenceId id = driven ? 0 : inbox.add(loop_request(1000));
    CHECK(driven || next(inbox)->events.committed.size() == 1);
    while (!driven && inbox.take()) {
    }
    {
      const LongForward forward(*loop);
      if (driven) id = inbox.add(loop_request(1000));
      auto reader = std::async(std::launch::async, [&] { return read(inbox); });
      auto second = std::async(std::launch::async, [&] { return read(inbox); });
      std::this_thread::sleep_for(1ms);
      other.cancel(id);  // is not its own
      inbox.cancel(id + 100);
      inbox.cancel(id);
      inbox.cancel(id);
      CHECK(ready(reader) && ready(second));  // the forward is still on
      const Ending one = reader.get(), two = second.get();
      CHECK(one.finished.value_or(FinishReason::cancelled) == FinishReason::cancelled);
      CHECK(one.finished || two.finished);  // one of them was told
      CHECK(!(one.finished && two.finished));
    }
    CHECK_EQ(living(*loop), 0);
  }
}

TEST(loop_cancel_before_the_first_forward) {
  const auto loop = make_loop();
  Inbox inbox(loop);
  inbox.cancel(inbox.add(loop_request(5)));
  CHECK(read(inbox).finished == FinishReason::cancelled);
  {
    const Inbox dropped(loop);
  }
  {
    Inbox dropped(loop);
    dropped.add(loop_request(5));
    dropped.add(loop_request(5));
    next(dropped);
  }
  CHECK_EQ(loop->n_sequences(), 0);
  CHECK_EQ(living(*loop), 0);
}

TEST(loop_close_ends_at_once_who_waits) {
  for (const bool driven : {false, true}) {
    const auto loop = make_loop();
    Inbox inbox(loop, driven);
    auto forward = std::make_unique<LongForward>(*loop);
    inbox.add(loop_request(1000));
    auto reader = std::async(std::launch::async, [&] { return read(inbox); });
    auto closer = std::async(std::launch::async, [&] { loop->close(); });
    CHECK(ready(reader));
    CHECK_EQ(reader.get().error, std::string("this engine is closed: make a new one"));
    CHECK(closer.wait_for(0s) != std::future_status::ready);  // the memory is in use
    forward.reset();
    CHECK(ready(closer));
    loop->close();
    CHECK_THROWS_WITH(inbox.add(loop_request(5)), "this engine is closed");
    CHECK_THROWS_WITH(loop->engine(), "this engine is closed");
    CHECK_THROWS_WITH(loop->between_forwards([](Engine&) { return 0; }), "this engine is closed");
    CHECK(!next(inbox));
  }
}

TEST(loop_refuses_what_the_engine_refuses) {
  const auto loop = make_loop();
  Inbox inbox(loop);
  CHECK_THROWS_WITH(inbox.add(loop_request(5, "sdb")), "unknown `decoder`");
  CHECK(!next(inbox));
}

// What a signal handler might do in the middle of a long call.
TEST(loop_refuses_to_wait_for_itself) {
  const auto loop = make_loop();
  loop->between_forwards([&](Engine&) {
    Inbox inbox(loop);
    inbox.add(loop_request(5));
    CHECK_THROWS_WITH(inbox.wait(), "the very call that was interrupted");
    CHECK_THROWS_WITH(loop->close(), "the very call that was interrupted");
    CHECK_THROWS_WITH(loop->between_forwards([](Engine&) { return 0; }), "the very call");
    return 0;
  });
  CHECK_EQ(loop->n_sequences(), 0);
}

// With rules on its rows, behind a prompt that others share.
Request ruled_request(const char* decoder, TokenId last) {
  Request request = loop_request(12, decoder);
  for (TokenId token = 0; token < 20; ++token) request.prompt.push_back(token % 7);
  request.prompt.push_back(last);
  request.logit_bias = {{3, 1.5f}, {4, -100.0f}};
  request.presence_penalty = 0.5f;
  request.frequency_penalty = 0.3f;
  request.repetition_penalty = 1.2f;
  request.temperature = 0.8f;
  request.min_p = 0.05f;
  request.logprobs = 3;
  return request;
}

// Many threads start, read, cancel, stop, share and drop sequences, while engines are closed under
// them, which have less memory than all would take and keep what ended ones leave.
// SBD_STRESS_SECONDS and SBD_STRESS_THREADS make it longer.
class Stress {
 public:
  explicit Stress(double seconds) : end_(std::chrono::steady_clock::now() + as_duration(seconds)) {
    for (const Request& request : requests_) expected_.push_back(ending_alone(request));
  }

  void run(int n_threads) {
    loop_ = make_loop(kOptions);
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; ++i) {
      threads.emplace_back([this, i] { work(static_cast<std::uint64_t>(i)); });
    }
    while (std::chrono::steady_clock::now() < end_) {
      std::this_thread::sleep_for(50ms);
      const auto fresh = make_loop(kOptions);
      std::shared_ptr<Loop> old;
      {
        const std::lock_guard lock(mutex_);
        old = std::exchange(loop_, fresh);
      }
      old->close();
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(loop_->n_sequences(), 0);
    CHECK_EQ(living(*loop_), 0);
    std::printf(
        "%d texts whole, %d of them with rules, %d behind a cached prefix; %d cancelled, %d ended "
        "by a closed engine\n",
        n_whole_.load(), n_ruled_.load(), n_cached_.load(), n_cancelled_.load(), n_closed_.load());
    CHECK(n_whole_ > 0 && n_cancelled_ > 0 && n_closed_ > 0 && n_failed_ == 0);
    CHECK(n_ruled_ > 0 && n_cached_ > 0);
  }

 private:
  static std::chrono::steady_clock::duration as_duration(double seconds) {
    return std::chrono::duration_cast<std::chrono::steady_clock::duration>(
        std::chrono::duration<double>(seconds));
  }

  void work(std::uint64_t thread) {
    for (std::uint64_t turn = 0; std::chrono::steady_clock::now() < end_; ++turn) {
      std::shared_ptr<Loop> loop;
      {
        const std::lock_guard lock(mutex_);
        loop = loop_;
      }
      const std::uint64_t random = combine(thread, turn);
      try {
        generate(loop, random);
      } catch (const Error& error) {
        note_error(error.what());
      }
    }
  }

  void generate(const std::shared_ptr<Loop>& loop, std::uint64_t random) {
    const std::size_t which = random % requests_.size();
    Inbox inbox(loop, /*driven=*/random / 8 % 4 == 0);
    const SequenceId id = inbox.add(requests_[which]);
    switch (random / 32 % 7) {
      case 0: {  // beside another sequence, to the end
        const SequenceId other = inbox.add(requests_[0]);
        std::map<SequenceId, Ending> endings;
        while (const auto event = next(inbox)) add_to(endings[event->id], *event);
        check(endings[id], which);
        check(endings[other], 0);
        break;
      }
      case 1:  // dropped after a few events
        for (std::uint64_t n = random / 256 % 3; n > 0 && next(inbox); --n) {
        }
        break;
      case 2: {  // cancelled by another thread, and read by two
        Ending one, two;
        std::thread second([&] { two = read(inbox); });
        std::thread canceller([&] { inbox.cancel(id); });
        one = read(inbox);
        canceller.join();
        second.join();
        if (!one.error.empty()) note_error(one.error);
        if (!two.error.empty()) note_error(two.error);
        n_cancelled_ += one.finished == FinishReason::cancelled;
        n_cancelled_ += two.finished == FinishReason::cancelled;
        break;
      }
      case 3: {  // stopped by its reader, as by a stop string
        Ending ending;
        for (auto event = next(inbox); event; event = next(inbox)) {
          add_to(ending, *event);
          if (ending.tokens.size() >= 2) inbox.cancel(id);
        }
        if (!ending.error.empty()) note_error(ending.error);
        n_cancelled_ += ending.finished == FinishReason::cancelled;
        break;
      }
      case 4:  // beside another use of the engine
        loop->between_forwards([](Engine& engine) { return engine.forward({1, 2, 3}, 2); });
        check(read(inbox), which);
        break;
      default: check(read(inbox), which);
    }
  }

  void check(const Ending& ending, std::size_t which) {
    if (!ending.error.empty()) {
      note_error(ending.error);
    } else if (ending.tokens == expected_[which].tokens &&
               ending.logprobs == expected_[which].logprobs &&
               ending.finished == FinishReason::length) {
      ++n_whole_;
      n_ruled_ += !ending.logprobs.empty();
      n_cached_ += ending.cached_tokens > 0;
    } else {
      ++n_failed_;
    }
  }

  void note_error(const std::string& error) {
    ++(error.starts_with("this engine is closed") ? n_closed_ : n_failed_);
  }

  static inline const EngineOptions kOptions{
      .n_threads = 2, .kv_budget = 48 << 10, .prefix_cache = 16 << 10};
  const std::vector<Request> requests_ = {
      loop_request(3),           loop_request(9, "sbd"),
      loop_request(7, "ntp", 4), loop_request(14, "sbd", 2),
      ruled_request("ntp", 1),   ruled_request("sbd", 2),
      ruled_request("ntp", 3),   ruled_request("sbd_lossless", 4),
      ruled_request("d2f", 5)};
  std::vector<Ending> expected_;
  const std::chrono::steady_clock::time_point end_;
  std::mutex mutex_;
  std::shared_ptr<Loop> loop_;
  std::atomic<int> n_whole_{0}, n_ruled_{0}, n_cached_{0}, n_cancelled_{0}, n_closed_{0},
      n_failed_{0};
};

TEST(loop_stress) {
  const char* seconds = std::getenv("SBD_STRESS_SECONDS");
  const char* threads = std::getenv("SBD_STRESS_THREADS");
  Stress(seconds ? std::atof(seconds) : 0.3).run(threads ? std::atoi(threads) : 8);
}

}  // namespace
}  // namespace sbd
