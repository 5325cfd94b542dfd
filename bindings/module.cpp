// sbd_engine._core: the engine for Python. Thin: arguments arrive validated from sbd_engine, and
// everything that computes runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <exception>
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
#include "decode_defaults.h"
#include "engine.h"
#include "format/gguf.h"
#include "metadata.h"

namespace py = pybind11;

namespace sbd {
namespace {

// What one forward did to one sequence.
struct Event {
  std::vector<TokenId> committed;
  std::vector<std::tuple<int, TokenId, float, float>> revealed;  // as Reveal
  std::optional<std::string> finished;
  int prompt_rows;
  std::string error;
  std::optional<int> accepted;
  bool thought;
};

void raise(const char* error_class, const char* message) {
  const py::object type = py::module_::import("sbd_engine.errors").attr(error_class);
  py::set_error(type, message);
}

const char* error_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::value: return "SbdValueError";
    case ErrorKind::file: return "SbdFileError";
    case ErrorKind::memory: return "SbdMemoryError";
  }
  return "SbdError";
}

std::vector<std::string> dtype_names() {
  std::vector<std::string> names;
  for (const DType type : kDTypes) names.emplace_back(name(type));
  return names;
}

DType dtype_named(const std::string& wanted) {
  for (const DType type : kDTypes) {
    if (wanted == name(type)) return type;
  }
  fail(ErrorKind::value, "unknown type \"{}\": expected one of {}", wanted, joined(dtype_names()));
}

EngineOptions options(std::string device, int n_threads, int n_ctx, const std::string& kv_dtype) {
  return {.device = std::move(device),
          .n_threads = n_threads,
          .n_ctx = n_ctx,
          .kv_dtype = dtype_named(kv_dtype)};
}

std::unique_ptr<Engine> load(const std::filesystem::path& path, std::string device, int n_threads,
                             int n_ctx, const std::string& kv_dtype,
                             std::optional<std::filesystem::path> draft_lora) {
  EngineOptions chosen = options(std::move(device), n_threads, n_ctx, kv_dtype);
  chosen.draft_lora = std::move(draft_lora);
  const py::gil_scoped_release release;
  return std::make_unique<Engine>(path, chosen);
}

std::unique_ptr<Engine> random_engine(const py::dict& values, const std::string& dtype, bool tie,
                                      std::string device, int n_threads, int n_ctx,
                                      const std::string& kv_dtype) {
  const EngineOptions chosen = options(std::move(device), n_threads, n_ctx, kv_dtype);
  const Metadata metadata = to_metadata(values);
  const DType type = dtype_named(dtype);
  const py::gil_scoped_release release;
  return std::make_unique<Engine>(metadata, type, tie, chosen);
}

Event to_event(SequenceEvents& happened) {
  Event event{.committed = std::move(happened.events.committed),
              .revealed = {},
              .finished = std::nullopt,
              .prompt_rows = happened.prompt_rows,
              .error = std::move(happened.error),
              .accepted = happened.events.accepted,
              .thought = happened.events.thought};
  for (const Reveal& reveal : happened.events.revealed) {
    event.revealed.emplace_back(reveal.position, reveal.token, reveal.entropy, reveal.probability);
  }
  if (const auto reason = happened.events.finished) {
    event.finished = *reason == FinishReason::stop ? "stop" : "length";
  }
  return event;
}

// The events go straight into their sequences' inboxes: no signal handler can run between the
// forward and the last delivery, so a Ctrl-C never loses what another thread waits for. A sequence
// without an inbox was abandoned and is removed.
void step(Engine& engine, const py::dict& inboxes) {
  std::vector<SequenceEvents> all;
  {
    const py::gil_scoped_release release;
    all = engine.step();
  }
  for (SequenceEvents& happened : all) {
    const py::int_ id(happened.id);
    if (inboxes.contains(id)) {
      inboxes[id].attr("append")(to_event(happened));
    } else {
      engine.remove(happened.id);
    }
  }
}

// By name: the decoder, and the options that decide what it does.
py::dict resolve(const Engine& engine, const Request& request) {
  auto [decoder, options] = engine.resolve(request);
  options.block.unmask.proxy = order(options.block.unmask);
  const py::dict values = to_dict(options);
  py::dict resolved;
  resolved["decoder"] = decoder;
  for (const std::string_view name : options_in_force(decoder, options)) {
    resolved[py::str(name)] = values[py::str(name)];
  }
  return resolved;
}

py::array_t<float> forward(Engine& engine, const std::vector<TokenId>& tokens, int block) {
  auto logits = std::make_unique<std::vector<float>>();
  {
    const py::gil_scoped_release release;
    *logits = engine.forward(tokens, block);
  }
  const auto rows = static_cast<py::ssize_t>(tokens.size());
  const auto columns = static_cast<py::ssize_t>(engine.config().vocab_size);
  float* data = logits->data();
  const py::capsule owner(logits.release(),
                          [](void* held) { delete static_cast<std::vector<float>*>(held); });
  return py::array_t<float>({rows, columns}, data, owner);
}

py::dict peaks(Engine& engine) {
  Peaks measured;
  {
    const py::gil_scoped_release released;
    measured = engine.measure_peaks();
  }
  py::dict result;
  result["read"] = measured.read;
  result["int8"] = measured.int8;
  result["bf16"] = measured.bf16;
  result["f16"] = measured.f16;
  result["f32"] = measured.f32;
  return result;
}

// What is in a model file, without loading its weights into an engine.
py::dict read_gguf(const std::filesystem::path& path) {
  const GgufFile file(path);
  py::list tensors;
  for (const Tensor& tensor : file.tensors()) {
    tensors.append(py::make_tuple(tensor.name, std::string(name(tensor.dtype)),
                                  py::tuple(py::cast(tensor.shape)), tensor.data.size()));
  }
  py::dict contents;
  contents["metadata"] = to_dict(file.metadata());
  contents["tensors"] = tensors;
  contents["model_config"] = py::none();
  contents["defaults"] = py::none();
  contents["able_decoders"] = py::none();
  contents["problem"] = py::none();  // why the engine cannot run it, or a decoder it names
  try {
    const ModelConfig config = read_model_config(file.metadata());
    contents["model_config"] = to_dict(config);
    const DecoderOptions defaults = read_decode_defaults(file.metadata(), config);
    contents["defaults"] = to_dict(defaults);
    const int n_ctx = config.max_position_embeddings;
    contents["able_decoders"] = able_decoders(defaults, n_ctx);
    for (const std::string& decoder : defaults.named) {
      if (contents["problem"].is_none()) contents["problem"] = refusal(decoder, defaults, n_ctx);
    }
  } catch (const Error& error) {
    contents["problem"] = error.what();
  }
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

  py::class_<Event>(module, "Event")
      .def_readonly("committed", &Event::committed)
      .def_readonly("revealed", &Event::revealed)
      .def_readonly("finished", &Event::finished)
      .def_readonly("prompt_rows", &Event::prompt_rows)
      .def_readonly("error", &Event::error)
      .def_readonly("accepted", &Event::accepted)
      .def_readonly("thought", &Event::thought);

  py::class_<Request>(module, "Request")
      .def(py::init<>())
      .def_readwrite("prompt", &Request::prompt)
      .def_readwrite("max_tokens", &Request::max_tokens)
      .def_readwrite("decoder", &Request::decoder)
      .def_readwrite("block_size", &Request::block_size)
      .def_readwrite("unmask", &Request::unmask)
      .def_readwrite("proxy", &Request::proxy)
      .def_readwrite("gamma", &Request::gamma)
      .def_readwrite("factor", &Request::factor)
      .def_readwrite("confidence_threshold", &Request::confidence_threshold)
      .def_readwrite("top_n", &Request::top_n)
      .def_readwrite("steps", &Request::steps)
      .def_readwrite("horizon", &Request::horizon)
      .def_readwrite("block_add_threshold", &Request::block_add_threshold)
      .def_readwrite("decoded_token_threshold", &Request::decoded_token_threshold)
      .def_readwrite("skip_threshold", &Request::skip_threshold)
      .def_readwrite("temperature", &Request::temperature)
      .def_readwrite("top_p", &Request::top_p)
      .def_readwrite("top_k", &Request::top_k)
      .def_readwrite("seed", &Request::seed)
      .def_readwrite("sample_index", &Request::sample_index)
      .def_readwrite("ignore_eos", &Request::ignore_eos);

  const auto device = py::arg("device");
  const auto n_threads = py::arg("n_threads");
  const auto n_ctx = py::arg("n_ctx");
  const auto kv_dtype = py::arg("kv_dtype");
  py::class_<Engine>(module, "Engine")
      .def(py::init(&load), py::arg("path"), device, n_threads, n_ctx, kv_dtype,
           py::arg("draft_lora") = std::nullopt)
      .def_static("random", &random_engine, py::arg("metadata"), py::arg("dtype"), py::arg("tie"),
                  device, n_threads, n_ctx, kv_dtype)
      .def("metadata", [](const Engine& engine) { return to_dict(engine.metadata()); })
      .def("model_config", [](const Engine& engine) { return to_dict(engine.config()); })
      .def("defaults", [](const Engine& engine) { return to_dict(engine.defaults()); })
      .def_property_readonly("n_ctx", &Engine::n_ctx)
      .def_property_readonly("n_threads", &Engine::n_threads)
      .def_property_readonly("device", &Engine::device)
      .def_property_readonly("auto_decoder", &Engine::auto_decoder)
      .def("resolve", &resolve, py::arg("request"))
      .def("check", &Engine::check, py::arg("request"))
      .def("add", &Engine::add, py::arg("request"))
      .def("remove", &Engine::remove, py::arg("id"))
      .def("step", &step, py::arg("inboxes"))
      .def("forward", &forward, py::arg("tokens"), py::arg("block"))
      .def("time_forwards", &Engine::time_forwards, py::arg("rows"), py::arg("context"),
           py::arg("repeats"), py::arg("n_sequences") = 1, py::call_guard<py::gil_scoped_release>())
      .def("measure_peaks", &peaks);

  module.attr("DTYPES") = py::tuple(py::cast(dtype_names()));
  module.def("read_gguf", &read_gguf, py::arg("path"));
}
