// The engine for many threads. Every sequence belongs to one inbox, where its events arrive. Who
// waits for an inbox runs the next forward itself where no other thread does: a lone caller never
// changes threads, and of several one steps while the others sleep until their own inbox has
// something. For inboxes that ask for it a thread of the loop's own does it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "core/at_fork.h"
#include "core/bell.h"
#include "engine.h"
#include "request.h"

namespace sbd {

// How long a thread sleeps at most until its signal handlers have their turn.
inline constexpr std::chrono::milliseconds kPatience{50};

// What happened to a sequence. Its last event says how it finished, or holds an error.
struct Event {
  SequenceId id;  // as Inbox::add gave it
  Events events = {};
  int prompt_rows = 0;
  int cached_tokens = 0;
  std::exception_ptr error = {};
  std::chrono::steady_clock::time_point at = std::chrono::steady_clock::now();

  bool last() const { return error || events.finished; }
};

class Inbox;

// In a forked child an idle engine on the CPU goes on, without the sequences it had: those belong
// to the parent. One that was in the middle of a forward, or is on a GPU, is only an error.
class Loop {
 public:
  explicit Loop(std::unique_ptr<Engine> engine);
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  // For what never changes of it. Throws once the loop is closed, as all below do.
  std::shared_ptr<const Engine> engine() const;

  // Sequences that have not had their last event.
  int n_sequences() const;
  // Of the engine, as of its last forward.
  Usage usage() const;

  // Calls fn(engine) while no forward runs.
  template <typename Fn>
  auto between_forwards(Fn&& fn) {
    const Turn turn(*this);
    return fn(*turn.engine);
  }

  // Ends all sequences with an error, at once, and frees the engine, when its forward is over.
  void close();

 private:
  friend class Inbox;
  using Lock = std::unique_lock<std::mutex>;

  // An end must be told whatever memory is left, so the room for it is taken at the beginning. All
  // that a step does with the lock held only moves what is there.
  struct Sequence {
    Inbox* inbox;
    std::list<Event> last;  // one, for its last event
  };
  using Sequences = std::map<SequenceId, Sequence>;
  struct Arriving {
    Request request;
    std::exception_ptr error = {};  // why it could not be added
  };

  // A thread's use of the engine, which excludes others.
  struct Turn {
    explicit Turn(Loop& loop);
    ~Turn();
    Loop& loop;
    Engine* engine;
  };

  void begin_turn();
  void end_turn(Lock& lock);
  bool may_begin_turn() const { return !in_turn_ && queued_ == 0; }
  void refuse_own_turn() const;
  // Where nobody is in turn, wakes one thread that waits to be.
  void pass_turn();

  void start_driver();
  void drive();
  void step(Lock& lock);
  void leave(Lock& lock);
  // The first of the events.
  void deliver(std::list<Event>& events);
  void end(Sequences::iterator sequence, Event last);
  void end_all(const std::exception_ptr& error);
  void check_open() const;
  void in_child();

  mutable std::mutex mutex_;  // of all below, and of the inboxes; never held through a forward
  std::shared_ptr<Engine> engine_;
  Usage usage_;
  std::string gone_;  // why there is no engine
  bool survives_fork_;
  bool in_turn_ = false;
  std::thread::id owner_;  // of the turn
  int queued_ = 0;         // threads that wait in between_forwards() and close()
  // Conditions are behind pointers because a child leaves the parent's as they are: threads it
  // does not have wait there.
  std::unique_ptr<std::condition_variable> turn_over_;
  SequenceId next_id_ = 1;                   // in the engine too
  Sequences sequences_;                      // that have not had their last event
  std::map<SequenceId, Arriving> arriving_;  // of them, for the next step to add, oldest first
  Sequences leaving_;                        // for the engine to remove
  std::set<Inbox*> inboxes_;
  std::thread driver_;  // while there was ever a driven inbox
  int n_driven_ = 0;    // sequences of driven inboxes
  bool ending_ = false;
  AtFork at_fork_;
};

class Inbox {
 public:
  // driven: who waits for it never runs a forward, and so is there for an event at any moment. It
  // has a bell.
  explicit Inbox(std::shared_ptr<Loop> loop, bool driven = false);
  ~Inbox();  // its sequences are removed
  Inbox(const Inbox&) = delete;
  Inbox& operator=(const Inbox&) = delete;

  // Throws what Engine::check does; that there is no memory for it is an event. Never waits for a
  // forward.
  SequenceId add(Request request);
  // Unless it has ended, its next event is its last: cancelled.
  void cancel(SequenceId id);

  // Runs a forward, or waits for events while another thread does, no longer than kPatience.
  // Returns at once where there are events or none will come. gathering: runs forwards for so long
  // as no sequence ends, for who has the time: many events are read faster together than each
  // behind a forward that has left no cache warm.
  void wait(std::chrono::microseconds gathering = {});
  // Whether there are events, or some will come.
  bool expects() const;
  // The oldest event, in the order that they happened.
  std::optional<Event> take();
  // A descriptor that is readable from an event on until take() has found none; -1: it is not
  // driven.
  int bell() const { return bell_ ? bell_->descriptor() : -1; }

 private:
  friend class Loop;

  // The only one of the events.
  void arrive(std::list<Event>& event);

  const std::shared_ptr<Loop> loop_;
  const bool driven_;
  std::list<Event> events_;
  int n_sequences_ = 0;  // that have not had their last event
  int n_sleeping_ = 0;   // threads in wait()
  std::unique_ptr<std::condition_variable> arrived_;
  std::unique_ptr<Bell> bell_;
};

}  // namespace sbd
