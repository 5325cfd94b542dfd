#include "loop.h"

#include <new>
#include <system_error>
#include <utility>

#include "core/error.h"
#include "core/interrupt.h"

namespace sbd {

namespace {

std::exception_ptr error_of(const std::string& message, ErrorKind kind = ErrorKind::value) {
  return std::make_exception_ptr(Error(kind, message));
}

// In a forked child: forgets the condition, for which threads of the parent may be waiting.
void replace(std::unique_ptr<std::condition_variable>& condition) {
  static_cast<void>(condition.release());
  condition = std::make_unique<std::condition_variable>();
}

}  // namespace

Loop::Turn::Turn(Loop& of) : loop(of) {
  Lock lock(loop.mutex_);
  loop.refuse_own_turn();
  while (loop.in_turn_) {
    ++loop.queued_;
    loop.turn_over_->wait_for(lock, kPatience);
    --loop.queued_;
    lock.unlock();
    check_interrupt();
    lock.lock();
  }
  loop.check_open();
  engine = loop.engine_.get();
  loop.begin_turn();
}

Loop::Turn::~Turn() {
  Lock lock(loop.mutex_);
  loop.end_turn(lock);
}

Loop::Loop(std::unique_ptr<Engine> engine)
    : engine_(std::move(engine)),
      survives_fork_(engine_->device().starts_with("cpu")),
      turn_over_(std::make_unique<std::condition_variable>()),
      at_fork_([this] { mutex_.lock(); }, [this] { mutex_.unlock(); }, [this] { in_child(); }) {}

Loop::~Loop() {
  close();
  {
    const Lock lock(mutex_);
    ending_ = true;
    turn_over_->notify_all();
  }
  if (driver_.joinable()) driver_.join();
}

std::shared_ptr<const Engine> Loop::engine() const {
  const Lock lock(mutex_);
  check_open();
  return engine_;
}

int Loop::n_sequences() const {
  const Lock lock(mutex_);
  return static_cast<int>(sequences_.size());
}

Usage Loop::usage() const {
  const Lock lock(mutex_);
  return usage_;
}

void Loop::close() {
  std::shared_ptr<Engine> engine;  // freed without the lock
  Lock lock(mutex_);
  refuse_own_turn();
  engine = std::exchange(engine_, nullptr);
  if (engine) gone_ = "this engine is closed: make a new one";
  while (!sequences_.empty()) {
    end(sequences_.begin(), {.id = sequences_.begin()->first, .error = error_of(gone_)});
  }
  ++queued_;
  turn_over_->wait(lock, [&] { return !in_turn_; });
  --queued_;
  pass_turn();
}

void Loop::check_open() const { SBD_CHECK(engine_, "{}", gone_); }

void Loop::begin_turn() {
  in_turn_ = true;
  owner_ = std::this_thread::get_id();
}

// Caches are freed without the lock.
void Loop::end_turn(Lock& lock) {
  while (engine_ && !leaving_.empty()) {
    const std::vector<SequenceId> leaving = std::exchange(leaving_, {});
    Engine* engine = engine_.get();
    lock.unlock();
    for (const SequenceId id : leaving) engine->remove(id);
    lock.lock();
  }
  if (engine_) usage_ = engine_->usage();
  in_turn_ = false;
  owner_ = {};
  pass_turn();
}

// A signal handler that runs inside a thread's turn would wait for that thread.
void Loop::refuse_own_turn() const {
  SBD_CHECK(owner_ != std::this_thread::get_id(),
            "this engine is in use by the very call that was interrupted");
}

void Loop::pass_turn() {
  if (in_turn_) return;
  if (queued_ > 0 || n_driven_ > 0) {
    turn_over_->notify_all();
    return;
  }
  for (Inbox* inbox : inboxes_) {
    if (inbox->n_sleeping_ > 0 && inbox->events_.empty()) {
      inbox->arrived_->notify_one();
      return;
    }
  }
}

void Loop::start_driver() {
  if (driver_.joinable()) return;
  try {
    driver_ = std::thread(&Loop::drive, this);
  } catch (const std::system_error& error) {
    fail(ErrorKind::memory, "the thread that drives async streams could not be started ({})",
         error.what());
  }
}

void Loop::drive() {
  Lock lock(mutex_);
  while (!ending_) {
    if (n_driven_ > 0 && may_begin_turn()) {
      try {
        step(lock);
      } catch (const std::bad_alloc&) {  // for some event; the next forward may have more luck
      }
    } else {
      turn_over_->wait(lock);
    }
  }
}

// One forward, over what was added until now as well.
void Loop::step(Lock& lock) {
  struct Ending {
    Loop& loop;
    Lock& lock;
    ~Ending() {
      if (!lock.owns_lock()) lock.lock();
      loop.end_turn(lock);
    }
  };
  begin_turn();
  const Ending ending{*this, lock};
  const std::map<SequenceId, Request> arriving = std::exchange(arriving_, {});
  Engine* engine = engine_.get();  // lives: close() waits for the turn's end
  if (engine == nullptr) return;

  lock.unlock();
  std::vector<std::pair<SequenceId, SequenceId>> added;
  std::vector<Event> failed;
  for (const auto& [id, request] : arriving) {
    try {
      added.emplace_back(id, engine->add(request));
    } catch (...) {
      failed.push_back({.id = id, .error = std::current_exception()});
    }
  }
  std::vector<SequenceEvents> happened;
  std::exception_ptr all_failed;
  try {
    happened = engine->step();
  } catch (...) {  // no single sequence's fault: that would be among its events
    all_failed = std::current_exception();
  }
  lock.lock();

  for (const auto& [id, in_engine] : added) {
    const auto sequence = sequences_.find(id);
    if (sequence == sequences_.end()) {  // cancelled meanwhile
      leaving_.push_back(in_engine);
    } else {
      sequence->second.in_engine = in_engine;
      ids_.emplace(in_engine, id);
    }
  }
  for (Event& event : failed) deliver(std::move(event));
  for (SequenceEvents& events : happened) {
    if (const auto id = ids_.find(events.id); id != ids_.end()) {
      deliver(
          {.id = id->second,
           .events = std::move(events.events),
           .prompt_rows = events.prompt_rows,
           .cached_tokens = events.cached_tokens,
           .error = events.error.empty() ? nullptr : error_of(events.error, events.error_kind)});
    }
  }
  while (all_failed && !ids_.empty()) deliver({.id = ids_.begin()->second, .error = all_failed});
}

// Where no forward runs, what was cancelled leaves now; else behind it.
void Loop::leave(Lock& lock) {
  if (in_turn_) return;
  begin_turn();
  end_turn(lock);
}

void Loop::deliver(Event event) {
  const auto sequence = sequences_.find(event.id);
  if (sequence == sequences_.end()) return;
  if (event.last()) {
    end(sequence, std::move(event));
    return;
  }
  Inbox& inbox = *sequence->second.inbox;
  inbox.events_.push_back(std::move(event));
  inbox.arrived_->notify_all();
}

void Loop::end(Sequences::iterator sequence, Event last) {
  const auto [inbox, in_engine] = sequence->second;
  arriving_.erase(sequence->first);
  if (in_engine) {
    leaving_.push_back(*in_engine);  // where the engine has not done so by itself
    ids_.erase(*in_engine);
  }
  sequences_.erase(sequence);
  --inbox->n_sequences_;
  n_driven_ -= inbox->driven_;
  inbox->events_.push_back(std::move(last));
  inbox->arrived_->notify_all();
}

// Holds the mutex since before the fork.
void Loop::in_child() {
  replace(turn_over_);
  for (Inbox* inbox : inboxes_) {
    replace(inbox->arrived_);
    inbox->n_sleeping_ = 0;
  }
  const std::exception_ptr theirs = error_of(
      "this text is generated by the process that started it: in a forked child start another");
  while (!sequences_.empty()) {
    end(sequences_.begin(), {.id = sequences_.begin()->first, .error = theirs});
  }
  if (engine_ && (in_turn_ || !survives_fork_)) {
    gone_ = in_turn_ ? "this engine was in the middle of a forward when the process forked: make a "
                       "new one in the child"
                     : "this engine's GPU belongs to the process that forked: make a new one in a "
                       "process that was not forked (multiprocessing's \"spawn\")";
    new std::shared_ptr<Engine>(std::move(engine_));  // never freed: its threads are not here
    engine_ = nullptr;
  }
  new std::thread(std::move(driver_));  // another's handle can be neither joined nor destroyed
  in_turn_ = false;
  owner_ = {};
  queued_ = 0;
  mutex_.unlock();
}

Inbox::Inbox(std::shared_ptr<Loop> loop, bool driven)
    : loop_(std::move(loop)),
      driven_(driven),
      arrived_(std::make_unique<std::condition_variable>()) {
  const Loop::Lock lock(loop_->mutex_);
  loop_->inboxes_.insert(this);
}

Inbox::~Inbox() {
  Loop::Lock lock(loop_->mutex_);
  for (auto it = loop_->sequences_.begin(); it != loop_->sequences_.end();) {
    const auto sequence = it++;
    if (sequence->second.inbox == this) loop_->end(sequence, {.id = sequence->first});
  }
  loop_->inboxes_.erase(this);
  loop_->leave(lock);
}

SequenceId Inbox::add(Request request) {
  loop_->engine()->check(request);
  const Loop::Lock lock(loop_->mutex_);
  loop_->check_open();
  if (driven_) loop_->start_driver();
  const SequenceId id = loop_->next_id_++;
  loop_->sequences_.emplace(id, Loop::Sequence{this});
  loop_->arriving_.emplace(id, std::move(request));
  ++n_sequences_;
  loop_->n_driven_ += driven_;
  loop_->pass_turn();
  return id;
}

void Inbox::cancel(SequenceId id) {
  Loop::Lock lock(loop_->mutex_);
  const auto sequence = loop_->sequences_.find(id);
  if (sequence == loop_->sequences_.end() || sequence->second.inbox != this) return;
  Event cancelled{.id = id};
  cancelled.events.finished = FinishReason::cancelled;
  loop_->end(sequence, std::move(cancelled));
  loop_->leave(lock);
}

void Inbox::wait() {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  Loop::Lock lock(loop_->mutex_);
  std::cv_status status = std::cv_status::no_timeout;
  while (events_.empty() && n_sequences_ > 0 && status == std::cv_status::no_timeout) {
    if (!driven_ && loop_->may_begin_turn()) {
      loop_->step(lock);
      return;
    }
    loop_->refuse_own_turn();
    ++n_sleeping_;
    status = arrived_->wait_until(lock, until);
    --n_sleeping_;
  }
  loop_->pass_turn();  // it may have been woken to step
}

bool Inbox::expects() const {
  const Loop::Lock lock(loop_->mutex_);
  return !events_.empty() || n_sequences_ > 0;
}

std::optional<Event> Inbox::take() {
  const Loop::Lock lock(loop_->mutex_);
  if (events_.empty()) return std::nullopt;
  Event event = std::move(events_.front());
  events_.pop_front();
  return event;
}

}  // namespace sbd
