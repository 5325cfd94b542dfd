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
  end_all(error_of(gone_));
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
    const Sequences leaving = std::exchange(leaving_, {});
    Engine* engine = engine_.get();
    lock.unlock();
    for (const auto& [id, sequence] : leaving) engine->remove(id);
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
    fail(ErrorKind::memory, "the thread that drives event loops' texts could not be started ({})",
         error.what());
  }
}

void Loop::drive() {
  Lock lock(mutex_);
  while (!ending_) {
    if (n_driven_ > 0 && may_begin_turn()) {
      step(lock);
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
  std::map<SequenceId, Arriving> arriving = std::exchange(arriving_, {});
  Engine* engine = engine_.get();  // lives: close() waits for the turn's end
  if (engine == nullptr) return;

  lock.unlock();
  for (auto& [id, arrival] : arriving) {
    try {
      engine->add(arrival.request, id);
    } catch (...) {
      arrival.error = std::current_exception();
    }
  }
  std::list<Event> happened;
  std::exception_ptr all_failed;
  try {
    for (SequenceEvents& events : engine->step()) {
      happened.push_back(
          {.id = events.id,
           .events = std::move(events.events),
           .prompt_rows = events.prompt_rows,
           .cached_tokens = events.cached_tokens,
           .error = events.error.empty() ? nullptr : error_of(events.error, events.error_kind)});
    }
  } catch (...) {  // no single sequence's fault: that would be among its events
    happened.clear();
    all_failed = std::current_exception();
  }
  lock.lock();

  for (const auto& [id, arrival] : arriving) {
    const auto sequence = sequences_.find(id);
    if (arrival.error && sequence != sequences_.end()) {
      end(sequence, {.id = id, .error = arrival.error});
    }
  }
  while (!happened.empty()) deliver(happened);
  for (auto it = sequences_.begin(); all_failed && it != sequences_.end();) {
    const auto sequence = it++;
    const bool in_engine = !arriving_.contains(sequence->first);
    if (in_engine) end(sequence, {.id = sequence->first, .error = all_failed});
  }
}

// Where no forward runs, what was cancelled leaves now; else behind it.
void Loop::leave(Lock& lock) {
  if (in_turn_) return;
  begin_turn();
  end_turn(lock);
}

void Loop::deliver(std::list<Event>& events) {
  std::list<Event> one;
  one.splice(one.begin(), events, events.begin());
  const auto sequence = sequences_.find(one.front().id);
  if (sequence == sequences_.end()) return;  // cancelled meanwhile
  if (one.front().last()) {
    end(sequence, std::move(one.front()));
    return;
  }
  sequence->second.inbox->arrive(one);
}

void Loop::end(Sequences::iterator sequence, Event last) {
  auto node = sequences_.extract(sequence);
  auto& [inbox, room] = node.mapped();
  room.front() = std::move(last);
  --inbox->n_sequences_;
  n_driven_ -= inbox->driven_;
  inbox->arrive(room);
  const bool came_no_further = arriving_.erase(node.key()) > 0;
  if (!came_no_further)
    leaving_.insert(std::move(node));  // where the engine has not done so itself
}

void Loop::end_all(const std::exception_ptr& error) {
  while (!sequences_.empty()) {
    end(sequences_.begin(), {.id = sequences_.begin()->first, .error = error});
  }
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
  end_all(theirs);
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
      arrived_(std::make_unique<std::condition_variable>()),
      bell_(driven ? std::make_unique<Bell>() : nullptr) {
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
  Loop::Sequences sequence;
  sequence.emplace(id, Loop::Sequence{this, std::list<Event>(1)});
  loop_->arriving_.emplace(id, Loop::Arriving{std::move(request)});
  loop_->sequences_.merge(sequence);  // nothing from here on takes memory
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

void Inbox::wait(std::chrono::microseconds gathering) {
  const auto begin = std::chrono::steady_clock::now();
  Loop::Lock lock(loop_->mutex_);
  const int n = n_sequences_;
  std::cv_status status = std::cv_status::no_timeout;
  while (n > 0 && n_sequences_ == n && status == std::cv_status::no_timeout) {
    const bool may_step = !driven_ && loop_->may_begin_turn();
    if (!events_.empty() && (gathering.count() == 0 || !may_step)) break;
    if (may_step) {
      loop_->step(lock);
      if (std::chrono::steady_clock::now() - begin >= gathering) return;
      continue;
    }
    loop_->refuse_own_turn();
    ++n_sleeping_;
    status = arrived_->wait_until(lock, begin + kPatience);
    --n_sleeping_;
  }
  loop_->pass_turn();  // it may have been woken to step
}

bool Inbox::expects() const {
  const Loop::Lock lock(loop_->mutex_);
  return !events_.empty() || n_sequences_ > 0;
}

void Inbox::arrive(std::list<Event>& event) {
  events_.splice(events_.end(), event);
  arrived_->notify_all();
  if (bell_) bell_->ring();
}

std::optional<Event> Inbox::take() {
  const Loop::Lock lock(loop_->mutex_);
  if (events_.empty()) {
    if (bell_) bell_->hush();
    return std::nullopt;
  }
  std::optional<Event> event = std::move(events_.front());
  events_.pop_front();
  return event;
}

}  // namespace sbd
