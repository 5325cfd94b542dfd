// sbd_engine._core: the engine for Python. Thin: arguments arrive validated from sbd_engine, and
// everything that computes or waits does so without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <chrono>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/interrupt.h"
#include "decode_defaults.h"
#include "engine.h"
#include "format/fingerprint.h"
#include "format/gguf.h"
#include "gil.h"
#include "grammar.h"
#include "loop.h"
#include "metadata.h"

namespace py = pybind11;

namespace sbd {
namespace {

void raise(const char* error_class, const char* message) {
  const py::object type = py::module_::import("sbd_engine.errors").attr(error_class);
  py::set_error(type, message);
}

const char* error_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::value: return "SbdValueError";
    case ErrorKind::file: return "SbdFileError";
    case ErrorKind::memory: return "SbdMemoryError";
    case ErrorKind::device: return "SbdDeviceError";
    case ErrorKind::grammar: return "SbdGrammarError";
  }
  return "SbdError";
}

std::vector<std::string> dtype_names() {
  std::vector<std::string> names;
  for (const DType type : kDTypes) names.emplace_back(name(type));
  return names;
}

std::vector<std::string> decoders_that(const std::function<bool(const std::string&)>& hold) {
  std::vector<std::string> names = decoder_names();
  std::erase_if(names, [&](const std::string& each) { return !hold(each); });
  return names;
}

DType dtype_named(const std::string& wanted) {
  for (const DType type : kDTypes) {
    if (wanted == name(type)) return type;
  }
  fail(ErrorKind::value, "unknown type \"{}\": expected one of {}", wanted, joined(dtype_names()));
}

// Python's signal handlers; they run in the main thread only.
void check_signals() {
  with_gil([] {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
}

using Bytes = std::optional<std::size_t>;
using OptionalPath = std::optional<std::filesystem::path>;

EngineOptions options(std::string device, int n_threads, int n_ctx, const std::string& kv_dtype,
                      Bytes kv_budget, Bytes prefix_cache, OptionalPath draft) {
  return {.device = std::move(device),
          .n_threads = n_threads,
          .n_ctx = n_ctx,
          .kv_dtype = dtype_named(kv_dtype),
          .draft = std::move(draft),
          .kv_budget = kv_budget,
          .prefix_cache = prefix_cache};
}

std::shared_ptr<Loop> load(const std::filesystem::path& path, std::string device, int n_threads,
                           int n_ctx, const std::string& kv_dtype, Bytes kv_budget,
                           Bytes prefix_cache, OptionalPath draft) {
  const EngineOptions chosen = options(std::move(device), n_threads, n_ctx, kv_dtype, kv_budget,
                                       prefix_cache, std::move(draft));
  return without_gil(
      [&] { return std::make_shared<Loop>(std::make_unique<Engine>(path, chosen)); });
}

std::shared_ptr<Loop> random_engine(const py::dict& values, const std::string& dtype, bool tie,
                                    std::string device, int n_threads, int n_ctx,
                                    const std::string& kv_dtype, Bytes kv_budget,
                                    Bytes prefix_cache, OptionalPath draft) {
  const EngineOptions chosen = options(std::move(device), n_threads, n_ctx, kv_dtype, kv_budget,
                                       prefix_cache, std::move(draft));
  const Metadata metadata = to_metadata(values);
  const DType type = dtype_named(dtype);
  return without_gil([&] {
    return std::make_shared<Loop>(std::make_unique<Engine>(metadata, type, tie, chosen));
  });
}

std::vector<std::tuple<int, TokenId, float, float>> revealed(const Event& event) {
  std::vector<std::tuple<int, TokenId, float, float>> all;
  for (const Reveal& reveal : event.events.revealed) {
    all.emplace_back(reveal.position, reveal.token, reveal.entropy, reveal.probability);
  }
  return all;
}

// A token, its log-probability, its rank (-1: not asked for), and the most probable ones.
using Scored = std::tuple<TokenId, float, int, std::vector<std::pair<TokenId, float>>>;

Scored scored(const RowScores& row) {
  std::vector<std::pair<TokenId, float>> best;
  best.reserve(row.best.size());
  for (const TokenScore& one : row.best) best.emplace_back(one.token, one.logprob);
  return {row.token.token, row.token.logprob, row.rank, std::move(best)};
}

std::vector<Scored> scores(const Event& event) {
  std::vector<Scored> all;
  for (const auto& row : event.events.scores) all.push_back(scored(*row));
  return all;
}

std::optional<std::string> finished(const Event& event) {
  if (!event.events.finished) return std::nullopt;
  switch (*event.events.finished) {
    case FinishReason::stop: return "stop";
    case FinishReason::complete: return "complete";
    case FinishReason::length: return "length";
    case FinishReason::cancelled: return "cancelled";
  }
  return std::nullopt;
}

std::optional<std::string_view> kind(const Event& event) {
  if (!event.events.kind) return std::nullopt;
  return name_of(kForwardKinds, *event.events.kind);
}

// All of it at once: each reader takes all, behind a forward that has left no cache warm for many
// calls.
py::tuple read_event(const Event& event) {
  if (event.error) std::rethrow_exception(event.error);
  const Events& events = event.events;
  const std::chrono::duration<double> age = std::chrono::steady_clock::now() - event.at;
  return py::make_tuple(events.committed, revealed(event), finished(event), scores(event),
                        py::make_tuple(event.prompt_rows, event.cached_tokens),
                        py::make_tuple(events.accepted, events.guesses, kind(event)),
                        events.ran_thinking, age.count());
}

// For so long nobody sees that an event has not come, nor that an interrupt has to wait.
constexpr std::chrono::milliseconds kGathering{20};

// The next event, or None where none will come. Signal handlers run before one is taken, and so is
// memory for it, so that what they raise, or that there is none, loses none.
py::object next_event(Inbox& inbox, bool wait, bool gather) {
  py::object next = py::cast(Event{});
  while (true) {
    if (auto event = inbox.take()) {
      next.cast<Event&>() = *std::move(event);
      return next;
    }
    if (!wait || !inbox.expects()) return py::none();
    without_gil([&] { inbox.wait(gather ? kGathering : std::chrono::microseconds{}); });
    drop_python_objects();
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

py::dict usage(const Loop& loop) {
  const Usage usage = loop.usage();
  py::dict values;
  values["forwards"] = usage.forwards;
  values["rows"] = usage.rows;
  values["prompt_rows"] = usage.prompt_rows;
  values["prompt_tokens"] = usage.prompt_tokens;
  values["cached_tokens"] = usage.cached_tokens;
  values["kv_used"] = usage.kv_used;
  values["kv_cached"] = usage.kv_cached;
  values["admitted"] = usage.admitted;
  values["waiting"] = usage.waiting;
  return values;
}

// By name: the decoder, and the options that decide what it does.
py::dict resolve(const Loop& loop, const Request& request) {
  const auto& [decoder, options] = loop.engine()->resolve(request);
  py::dict resolved;
  resolved["decoder"] = decoder;
  for (const auto& [name, value] : in_force(decoder, options)) resolved[name] = value;
  return resolved;
}

std::string_view type_of(const Option& option) {
  switch (option.type) {
    case OptionType::integer: return "int";
    case OptionType::number: return "float";
    case OptionType::name: break;
  }
  return "str";
}

py::array_t<float> forward(Loop& loop, const std::vector<TokenId>& tokens, int block) {
  auto logits = std::make_unique<std::vector<float>>(without_gil([&] {
    return loop.between_forwards([&](Engine& engine) { return engine.forward(tokens, block); });
  }));
  const auto rows = static_cast<py::ssize_t>(tokens.size());
  const auto columns = static_cast<py::ssize_t>(loop.engine()->config().vocab_size);
  float* data = logits->data();
  const py::capsule owner(logits.release(),
                          [](void* held) { delete static_cast<std::vector<float>*>(held); });
  return py::array_t<float>({rows, columns}, data, owner);
}

std::vector<Scored> score(Loop& loop, const std::vector<TokenId>& tokens, int top) {
  const std::vector<RowScores> rows = without_gil([&] {
    return loop.between_forwards([&](Engine& engine) { return engine.score(tokens, top); });
  });
  std::vector<Scored> all;
  for (const RowScores& row : rows) all.push_back(scored(row));
  return all;
}

std::vector<std::vector<double>> time_forwards(Loop& loop, const std::vector<int>& rows,
                                               int context, int repeats, int n_sequences,
                                               bool adapted) {
  return without_gil([&] {
    return loop.between_forwards([&](Engine& engine) {
      return engine.time_forwards(rows, context, repeats, n_sequences, adapted);
    });
  });
}

py::dict peaks(Loop& loop) {
  const Peaks measured = without_gil(
      [&] { return loop.between_forwards([](Engine& engine) { return engine.measure_peaks(); }); });
  py::dict result;
  result["read"] = measured.read;
  result["int8"] = measured.int8;
  result["bf16"] = measured.bf16;
  result["f16"] = measured.f16;
  result["f32"] = measured.f32;
  return result;
}

void close_engine(Loop& loop) {
  without_gil([&] { loop.close(); });
}

py::dict profile_forward(Loop& loop, int rows, int context) {
  const ForwardProfile profile = without_gil([&] {
    return loop.between_forwards(
        [&](Engine& engine) { return engine.profile_forward(rows, context); });
  });
  py::list kernels;
  for (const KernelTime& kernel : profile.kernels) {
    kernels.append(py::dict(py::arg("name") = kernel.name, py::arg("calls") = kernel.calls,
                            py::arg("us") = kernel.us, py::arg("bytes") = kernel.bytes));
  }
  return py::dict(py::arg("kernels") = kernels, py::arg("graph_us") = profile.graph_us,
                  py::arg("in_turn_us") = profile.in_turn_us,
                  py::arg("matmuls_us") = profile.matmuls_us);
}

// By the weight's name: of how many rows, and the sums of each column's squares.
py::dict input_squares(Loop& loop, const std::vector<TokenId>& tokens) {
  const std::vector<InputSquares> all = without_gil([&] {
    return loop.between_forwards([&](Engine& engine) { return engine.input_squares(tokens); });
  });
  py::dict result;
  for (const InputSquares& each : all) {
    const py::array_t<double> sums(static_cast<py::ssize_t>(each.sums.size()), each.sums.data());
    result[py::str(each.weight)] = py::make_tuple(each.n_rows, sums);
  }
  return result;
}

// The best draft where a share of the guesses agrees, for sequences that share forwards of these
// times by their rows, all alike: its block size, whether it is verified alone, whether the next
// one is drafted for every outcome, and how much faster than next-token decoding it is. A block
// size of 1: none is.
py::tuple best_lossless(const std::map<int, double>& ms_by_rows, double agreement, int sequences) {
  ForwardCosts costs;
  for (const auto& [rows, ms] : ms_by_rows) costs.record(rows, ms);
  const auto ms = [&](int rows) { return costs.ms(sequences * rows) / sequences; };
  const DraftOption best = best_draft(
      ms, kMaxDraft, costs.max_rows() / sequences, [&](int) { return agreement; },
      /*refinement=*/0, /*known=*/false);
  const double speedup = best.ms > 0 ? best.rate() * ms(1) : 0;
  if (speedup <= 1) return py::make_tuple(1, false, false, 1.0);
  return py::make_tuple(best.draft.size, best.draft.begins == Begins::alone,
                        best.draft.begins == Begins::every, speedup);
}

// What is in a model file, without loading its weights into an engine.
py::dict read_gguf(const std::filesystem::path& path) {
  const GgufFile file(path);
  py::list tensors;
  for (const FileTensor& tensor : file.tensors()) {
    tensors.append(py::make_tuple(tensor.name, py::str(tensor.type).attr("lower")(),
                                  py::tuple(py::cast(tensor.shape)), tensor.n_bytes));
  }
  py::dict contents;
  contents["metadata"] = to_dict(file.metadata());
  contents["tensors"] = tensors;
  contents["data_begin"] = file.data_begin();
  contents["model_config"] = py::none();
  contents["defaults"] = py::none();
  contents["decoders"] = py::none();
  contents["fingerprint"] = py::none();
  // Why the engine cannot run it, or a decoder that it names.
  std::string problem = why_types_cannot_run(file.tensors());
  const auto add_problem = [&](const std::string& another) {
    problem += (problem.empty() ? "" : "; ") + another;
  };
  try {
    const ModelConfig config = read_model_config(file.metadata(), file.tensors());
    contents["model_config"] = to_dict(config);
    contents["fingerprint"] = fingerprint(file);
    const DecoderOptions defaults = read_decode_defaults(file.metadata(), config);
    contents["defaults"] = to_dict(defaults);
    const int n_ctx = config.max_position_embeddings;
    py::dict decoders;  // that can run, each with the options that it reads
    for (const std::string& decoder : able_decoders(defaults, n_ctx)) {
      decoders[py::str(decoder)] = in_force(decoder, defaults);
    }
    contents["decoders"] = decoders;
    for (const std::string& decoder : defaults.named) {
      if (const auto why = refusal(decoder, defaults, n_ctx)) {
        add_problem(*why);
        break;
      }
    }
  } catch (const Error& error) {
    add_problem(error.what());
  }
  contents["problem"] = problem.empty() ? py::object(py::none()) : py::str(problem);
  return contents;
}

}  // namespace
}  // namespace sbd

PYBIND11_MODULE(_core, module) {
  using namespace sbd;

  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Error& error) {
      raise(error_class(error.kind()), error.what());
    } catch (const std::bad_alloc&) {
      raise("SbdMemoryError", "out of memory: use a smaller model, type or `n_ctx`");
    }
  });

  watch_for_the_end_of_python();
  check_interrupt = check_signals;

  py::class_<Event>(module, "Event")
      .def_readonly("id", &Event::id)
      .def_property_readonly("last", &Event::last)
      .def("read", &read_event);

  py::class_<Option>(module, "Option")
      .def_readonly("name", &Option::name)
      .def_readonly("key", &Option::key)
      .def_readonly("older_key", &Option::older_key)
      .def_readonly("help", &Option::help)
      .def_property_readonly("type", &type_of)
      .def_property_readonly("low", [](const Option& option) { return option.range.low; })
      .def_property_readonly("high", [](const Option& option) { return option.range.high; })
      .def_property_readonly("expected", [](const Option& option) { return option.range.words(); })
      .def("holds", [](const Option& option, double value) { return option.range.holds(value); })
      .def_property_readonly("default",
                             [](const Option& option) { return option.get(DecoderOptions()); })
      .def_property_readonly(
          "decoders",
          [](const Option& option) {
            return decoders_that([&](const std::string& each) { return reads(each, option); });
          })
      .def_property_readonly("choices", [](const Option& option) {
        return option.choices ? option.choices() : std::vector<std::string_view>();
      });

  bind_grammars(module);

  py::class_<Request>(module, "Request")
      .def(py::init<>())
      .def_readwrite("prompt", &Request::prompt)
      .def_readwrite("max_tokens", &Request::max_tokens)
      .def_readwrite("decoder", &Request::decoder)
      .def_readwrite("options", &Request::options)
      .def_readwrite("temperature", &Request::temperature)
      .def_readwrite("top_p", &Request::top_p)
      .def_readwrite("top_k", &Request::top_k)
      .def_readwrite("min_p", &Request::min_p)
      .def_readwrite("logit_bias", &Request::logit_bias)
      .def_readwrite("presence_penalty", &Request::presence_penalty)
      .def_readwrite("frequency_penalty", &Request::frequency_penalty)
      .def_readwrite("repetition_penalty", &Request::repetition_penalty)
      .def_readwrite("logprobs", &Request::logprobs)
      .def_property("grammar", py::cpp_function(),
                    [](Request& request, std::shared_ptr<Grammar> grammar) {
                      request.grammar = std::move(grammar);
                    })
      .def_readwrite("seed", &Request::seed)
      .def_readwrite("sample_index", &Request::sample_index)
      .def_readwrite("ignore_eos", &Request::ignore_eos);

  const auto device = py::arg("device");
  const auto n_threads = py::arg("n_threads");
  const auto n_ctx = py::arg("n_ctx");
  const auto kv_dtype = py::arg("kv_dtype");
  const auto kv_budget = py::arg("kv_budget") = std::nullopt;
  const auto prefix_cache = py::arg("prefix_cache") = Bytes{0};
  const auto draft = py::arg("draft") = std::nullopt;
  py::class_<Loop, std::shared_ptr<Loop>>(module, "Engine")
      .def(py::init(&load), py::arg("path"), device, n_threads, n_ctx, kv_dtype, kv_budget,
           prefix_cache, draft)
      .def_static("random", &random_engine, py::arg("metadata"), py::arg("dtype"), py::arg("tie"),
                  device, n_threads, n_ctx, kv_dtype, kv_budget, prefix_cache, draft)
      .def("metadata", [](const Loop& loop) { return to_dict(loop.engine()->metadata()); })
      .def("model_config", [](const Loop& loop) { return to_dict(loop.engine()->config()); })
      .def("defaults", [](const Loop& loop) { return to_dict(loop.engine()->defaults()); })
      .def_property_readonly("n_ctx", [](const Loop& loop) { return loop.engine()->n_ctx(); })
      .def_property_readonly("n_threads",
                             [](const Loop& loop) { return loop.engine()->n_threads(); })
      .def_property_readonly("kv_budget",
                             [](const Loop& loop) { return loop.engine()->kv_budget(); })
      .def_property_readonly("prefix_cache",
                             [](const Loop& loop) { return loop.engine()->prefix_cache(); })
      .def_property_readonly("kv_positions",
                             [](const Loop& loop) { return loop.engine()->kv_positions(); })
      .def_property_readonly("decoders", [](const Loop& loop) { return loop.engine()->decoders(); })
      .def_property_readonly("usage", &usage)
      .def_property_readonly("device", [](const Loop& loop) { return loop.engine()->device(); })
      .def_property_readonly("auto_decoder",
                             [](const Loop& loop) { return loop.engine()->auto_decoder(); })
      .def("resolve", &resolve, py::arg("request"))
      .def(
          "check", [](const Loop& loop, const Request& request) { loop.engine()->check(request); },
          py::arg("request"))
      .def_property_readonly("n_sequences", &Loop::n_sequences)
      .def("forward", &forward, py::arg("tokens"), py::arg("block"))
      .def("score", &score, py::arg("tokens"), py::arg("top"))
      .def("time_forwards", &time_forwards, py::arg("rows"), py::arg("context"), py::arg("repeats"),
           py::arg("n_sequences") = 1, py::arg("adapted") = false)
      .def("profile_forward", &profile_forward, py::arg("rows"), py::arg("context"))
      .def("input_squares", &input_squares, py::arg("tokens"))
      .def("measure_peaks", &peaks)
      .def("close", &close_engine);

  py::class_<Inbox>(module, "Inbox")
      .def(py::init<std::shared_ptr<Loop>, bool>(), py::arg("engine"), py::arg("driven") = false)
      .def("add", &Inbox::add, py::arg("request"))
      .def("cancel", &Inbox::cancel, py::arg("id"))
      .def("next", &next_event, py::arg("wait") = true, py::arg("gather") = false)
      .def_property_readonly("bell", &Inbox::bell);

  py::list options;
  for (const Option& option : all_options()) {
    options.append(py::cast(&option, py::return_value_policy::reference));
  }
  module.attr("OPTIONS") = py::tuple(options);
  module.attr("DTYPES") = py::tuple(py::cast(dtype_names()));
  module.attr("DRAFTING") = py::tuple(py::cast(decoders_that(drafts)));
  module.def("read_gguf", &read_gguf, py::arg("path"));
  module.def("best_lossless", &best_lossless, py::arg("ms_by_rows"), py::arg("agreement"),
             py::arg("sequences") = 1);
}
