#include "grammar.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"
#include "decode/choices.h"
#include "decode/constraint.h"
#include "gil.h"

namespace py = pybind11;

namespace sbd {
namespace {

// The step that needs a mask runs in any thread, without the GIL. Whoever takes it must hold none
// of the engine's locks, as others wait for these with the GIL in hand: so what is dropped in a
// lock is put aside, and methods are called from here, one after the other, not from a function in
// Python, in which a signal's handler could run.

// ---- objects ----

struct Object {
  PyObject* object;
  Object* next = nullptr;
};
std::atomic<Object*> dropped{nullptr};

class Reference {
 public:
  explicit Reference(py::object object)
      : held_(std::make_unique<Object>(Object{object.ptr()}).release()) {
    object.release();
  }
  ~Reference() {
    held_->next = dropped.load();
    while (!dropped.compare_exchange_weak(held_->next, held_)) {
    }
  }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;

  py::handle get() const { return held_->object; }

 private:
  Object* held_;
};

// ---- llguidance ----

template <typename Fn>
auto in_python(Fn&& fn) {
  return with_gil([&] {
    try {
      return fn();
    } catch (const py::error_already_set& error) {
      fail(ErrorKind::value, "llguidance: {}", py::str(error.value()).cast<std::string>());
    }
  });
}

// The model's tokens as llguidance knows them. Its end of sequence is none of them: it stands for
// all of the model's, where a text may end.
struct Vocabulary {
  int size;
  TokenId end;
  std::vector<TokenId> eos_token_ids;
};

class LlguidanceConstraint final : public Constraint {
 public:
  LlguidanceConstraint(py::object matcher, const Vocabulary& vocabulary)
      : matcher_(std::move(matcher)), vocabulary_(vocabulary) {}

  TokenSet allowed() override {
    return in_python([&] { return mask().tokens; });
  }

  bool consume(TokenId token) override {
    return in_python([&] {
      mask_.reset();
      py::list tokens;
      tokens.append(token);
      const bool consumed = call("try_consume_tokens", tokens).cast<int>() == 1;
      check();
      return consumed;
    });
  }

  void roll_back(int n) override {
    if (n == 0) return;
    in_python([&] {
      mask_.reset();
      call("rollback", n);
      check();
      return true;
    });
  }

  std::vector<TokenId> forced() override {
    return in_python([&] {
      auto tokens = call("compute_ff_tokens").cast<std::vector<TokenId>>();
      check();
      for (const TokenId token : tokens) {
        SBD_CHECK(token >= 0 && token < vocabulary_.size,
                  "the grammar forces token {}, which is outside the model's {}", token,
                  vocabulary_.size);
      }
      return tokens;
    });
  }

  bool ended() override {
    return in_python([&] {
      if (!call("is_accepting").cast<bool>()) return false;
      if (call("is_stopped").cast<bool>()) {
        check();
        return true;
      }
      return mask().only_end;
    });
  }

  void in_one_go(const std::function<void()>& fn) override { with_gil(fn); }

 private:
  struct Mask {
    TokenSet tokens;
    bool only_end;
  };

  template <typename... Args>
  py::object call(const char* method, Args&&... args) {
    return matcher_.get().attr(method)(std::forward<Args>(args)...);
  }

  // A matcher that has met its limits allows an end.
  void check() {
    if (!call("is_error").cast<bool>()) return;
    fail(ErrorKind::grammar, "the text has met a limit of its grammar: {}",
         call("get_error").attr("removesuffix")("<non-verbose/>").cast<std::string>());
  }

  // Behind what was consumed.
  const Mask& mask() {
    if (mask_) return *mask_;
    const auto bytes = call("compute_bitmask").cast<py::bytes>();
    check();
    const std::string_view bits = bytes;
    const auto size = static_cast<std::size_t>(vocabulary_.size);
    const auto end = static_cast<std::size_t>(vocabulary_.end);
    SBD_CHECK(bits.size() > end / 8, "expected a mask of {} tokens, got {} bytes", end + 1,
              bits.size());
    Mask mask{TokenSet((size + 31) / 32), false};
    std::memcpy(mask.tokens.data(), bits.data(), std::min(bits.size(), 4 * mask.tokens.size()));
    if (size % 32 != 0) mask.tokens.back() &= (1u << (size % 32)) - 1;
    if (end < size) mask.tokens[end / 32] &= ~(1u << (end % 32));
    if ((static_cast<unsigned char>(bits[end / 8]) >> (end % 8) & 1u) != 0) {
      mask.only_end =
          std::ranges::all_of(mask.tokens, [](std::uint32_t word) { return word == 0; });
      for (const TokenId token : vocabulary_.eos_token_ids) insert(mask.tokens, token);
    }
    mask_ = std::move(mask);
    return *mask_;
  }

  Reference matcher_;
  Vocabulary vocabulary_;
  std::optional<Mask> mask_;  // none: not known
};

class LlguidanceGrammar final : public Grammar {
 public:
  LlguidanceGrammar(py::object matcher, std::string name, Vocabulary vocabulary)
      : matcher_(std::move(matcher)), name_(std::move(name)), vocabulary_(std::move(vocabulary)) {}

  std::string_view name() const override { return name_; }
  int vocab_size() const override { return vocabulary_.size; }

  std::unique_ptr<Constraint> begin() const override {
    return in_python([&] {
      return std::make_unique<LlguidanceConstraint>(matcher_.get().attr("deep_copy")(),
                                                    vocabulary_);
    });
  }

 private:
  Reference matcher_;
  std::string name_;
  Vocabulary vocabulary_;
};

std::shared_ptr<LlguidanceGrammar> make_grammar(py::object matcher, std::string name,
                                                int vocab_size, TokenId end,
                                                std::vector<TokenId> eos_token_ids) {
  drop_python_objects();
  SBD_CHECK(end >= 0, "expected the id of an end, got {}", end);
  for (const TokenId token : eos_token_ids) {
    SBD_CHECK(token >= 0 && token < vocab_size, "end of sequence {} is outside {} tokens", token,
              vocab_size);
  }
  return std::make_shared<LlguidanceGrammar>(std::move(matcher), std::move(name),
                                             Vocabulary{vocab_size, end, std::move(eos_token_ids)});
}

}  // namespace

void drop_python_objects() {
  for (Object* each = dropped.exchange(nullptr); each != nullptr;) {
    const std::unique_ptr<Object> one(std::exchange(each, each->next));
    Py_DECREF(one->object);
  }
}

void bind_grammars(py::module_& module) {
  py::class_<Grammar, std::shared_ptr<Grammar>>(module, "Grammar");
  // matcher: an LLMatcher at its beginning. name: the argument that it came as.
  py::class_<LlguidanceGrammar, Grammar, std::shared_ptr<LlguidanceGrammar>>(module,
                                                                             "LlguidanceGrammar")
      .def(py::init(&make_grammar), py::arg("matcher"), py::arg("name"), py::arg("vocab_size"),
           py::arg("end"), py::arg("eos_token_ids"));
  py::class_<Choices, Grammar, std::shared_ptr<Choices>>(module, "Choices")
      .def(py::init<std::vector<std::vector<TokenId>>, int, std::vector<TokenId>>(),
           py::arg("texts"), py::arg("vocab_size"), py::arg("eos_token_ids"));
}

}  // namespace sbd
