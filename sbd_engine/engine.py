"""The engine for callers: prompts in, text out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _core
from .completion import Chunk, Completion
from .errors import SbdError, SbdTypeError, SbdValueError
from .model_file import ModelPath, existing, model_file
from .parameters import Parameters, Prompt, TokenIds, integer, named, one_of, parse, token_ids
from .session import Session
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from .parameters import Options

_MAX_IN_FLIGHT = 16  # sequences of generate_batch that share a forward
_REQUEST_FIELDS = [f.name for f in fields(Parameters) if f.name not in ("prompt", "stop")]


class _Prepared(NamedTuple):
    """A checked call, ready to start."""

    parameters: Parameters
    request: _core.Request
    ids: list[int]  # the prompt's


def _request(parameters: Parameters, ids: list[int]) -> _core.Request:
    request = _core.Request()
    request.prompt = ids
    for name in _REQUEST_FIELDS:
        setattr(request, name, getattr(parameters, name))
    return request


def engine_options(
    device: str, n_threads: int | None, n_ctx: int | None, kv_dtype: str
) -> dict[str, Any]:
    """The core's options (0 is its default) after a check."""
    if not isinstance(device, str):
        raise SbdTypeError(f"expected {named('device')} as a string, got {device!r}")
    if n_threads is not None and device.startswith("cuda"):
        raise SbdValueError(
            f"{named('n_threads')} has no effect with device {device}: leave it out, or use "
            f"{named('device')} cpu"
        )
    return {
        "device": device,
        "n_threads": 0 if n_threads is None else integer(named("n_threads"), n_threads, 1),
        "n_ctx": 0 if n_ctx is None else integer(named("n_ctx"), n_ctx, 1),
        "kv_dtype": one_of(named("kv_dtype"), kv_dtype, ("f16", "bf16", "f32")),
    }


class Engine:
    """A loaded model.

    path: a model file; None is the embedded demo model. device: "auto" (a GPU where one can be
    used), "cpu", "cuda" or "cuda:N". n_threads: of the CPU; None is one per available core. n_ctx:
    positions of the KV cache of each sequence; None is the model's. kv_dtype: "f16", "bf16" or
    "f32". draft_lora: a file with an adapter for decoders that draft, as `sbd-engine convert
    --draft-lora` writes it.

    Safe to use from several threads: sequences that are alive at the same time share forwards, and
    the result of one does not depend on the others.

    Raises SbdFileError (an OSError), SbdValueError, SbdTypeError and SbdMemoryError.
    """

    def __init__(
        self,
        path: ModelPath | None = None,
        device: str = "auto",
        n_threads: int | None = None,
        n_ctx: int | None = None,
        kv_dtype: str = "f16",
        draft_lora: ModelPath | None = None,
    ) -> None:
        options = engine_options(device, n_threads, n_ctx, kv_dtype)
        adapter = None if draft_lora is None else existing(draft_lora, named("draft_lora"))
        self._lock = threading.RLock()  # reentrant: a stream may be collected inside a step
        self._inboxes: dict[int, deque[_core.Event]] = {}
        self._core: _core.Engine | None = None
        with model_file(path) as file:
            self._name = file.name
            self._core = _core.Engine(file, **options, draft_lora=adapter)
        self._tokenizer_if_any()  # loaded now, so that the first call does not wait for it

    # ---- what the model is ----

    @cached_property
    def config(self) -> dict[str, Any]:
        """All metadata of the model file, by key."""
        return self._open().metadata()

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """Shapes and architecture, in the words of a Hugging Face config.json."""
        return self._open().model_config()

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What decoding takes from the file: block_size, unmask, gamma, ..."""
        return self._open().defaults()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises SbdValueError where it has none."""
        return Tokenizer(
            self.config, self.model_config["eos_token_ids"], self.model_config["mask_token_id"]
        )

    @property
    def auto_decoder(self) -> str:
        """What decoder="auto" stands for with this file."""
        return self._open().auto_decoder

    @property
    def device(self) -> str:
        """The backend and its instruction set, such as "cpu (avx512)"."""
        return self._open().device

    @property
    def n_threads(self) -> int:
        return self._open().n_threads

    @property
    def n_ctx(self) -> int:
        return self._open().n_ctx

    # ---- generation ----

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Generates up to max_tokens tokens after `prompt`, a string or token ids.

        Options, of which None is the default, and that the model file's where it has one:
          max_tokens=256, stop=() (a string or several), ignore_eos=False;
          decoder="auto" | "ntp" | "sbd" | "sbd_lossless" | "dmtd" | "d2f" | a family's own name;
          blocks: block_size=None, unmask=None ("entropy_bounded" | "factor" | "confidence" |
          "top_n"), gamma=None (nats), proxy=None ("entropy" | "confidence" | "margin" |
          "position"), factor=None, confidence_threshold=None, top_n=None, steps=None (forwards per
          block that top_n is spread over);
          dmtd: horizon=None; d2f: block_add_threshold=None, decoded_token_threshold=None,
          skip_threshold=None;
          temperature=0.0, top_p=1.0, top_k=0, seed=0, sample_index=0 (tells samples of one seed
          apart).
        A file without a tokenizer takes token ids and gives no text.

        Raises SbdTypeError for an unknown argument and SbdValueError for a bad value, or for an
        option that has no effect with the decoder, its unmasking rule or temperature 0. A seed is
        always welcome.
        """
        with self.stream(prompt, **options) as stream:
            for _ in stream:
                pass
            return stream.completion

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Like `generate`, as an iterator: one Chunk for each forward that decided something.
        Closing or dropping it frees its sequence; `completion` has the result and the stats."""
        called = time.perf_counter()
        return Stream(self, self._prepare({"prompt": prompt, **options}), called)

    def generate_batch(
        self, prompts: Iterable[Prompt | Mapping[str, Any]], **options: Unpack[Options]
    ) -> list[Completion]:
        """Generates for several prompts at once; the results are in order and each is what
        `generate` gives alone. The options are for all; a prompt in a dict of `generate`'s
        arguments has its own in front of them. All are checked before any starts."""
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise SbdTypeError(
                "expected a list of prompts, or of dicts of generate's arguments, "
                f"got {type(prompts).__name__}"
            )
        waiting: deque[tuple[int, _Prepared]] = deque()
        for index, item in enumerate(prompts):
            try:
                own = item if isinstance(item, Mapping) else {"prompt": item}
                prepared = self._prepare({**options, **own})
                with self._lock:
                    self._open().check(prepared.request)
            except SbdError as error:
                raise type(error)(f"prompt {index} of the batch: {error}") from None
            waiting.append((index, prepared))

        completions: dict[int, Completion] = {}
        running: dict[int, Stream] = {}
        try:
            while waiting or running:
                while waiting and len(running) < _MAX_IN_FLIGHT:
                    index, prepared = waiting.popleft()
                    running[index] = Stream(self, prepared, time.perf_counter())
                for index, stream in list(running.items()):
                    if next(stream, None) is None:
                        completions[index] = stream.completion
                        del running[index]
        finally:
            for stream in running.values():
                stream.close()
        return [completions[index] for index in sorted(completions)]

    def resolve(self, **options: Unpack[Options]) -> dict[str, Any]:
        """What these options come to with this model: the decoder, and the options that decide what
        it does, the file's own where none is given."""
        parameters = parse({"prompt": [0], **options})
        request = _request(parameters, [0])
        with self._lock:
            core = self._open()
            core.check(request)
            resolved = core.resolve(request)
        general = ["max_tokens", "ignore_eos", "temperature"]
        if parameters.temperature > 0:
            general += ["top_k", "top_p", "seed", "sample_index"]
        return {
            **resolved,
            **{name: getattr(parameters, name) for name in general},
            "stop": list(parameters.stop),
        }

    def forward(self, ids: TokenIds, block: int = 0) -> npt.NDArray[np.float32]:
        """Raw logits [len(ids), vocab_size] of an uncached forward: the last `block` rows see each
        other (one block), the rest are causal."""
        tokens = token_ids(ids, self.model_config["vocab_size"])
        block = integer(named("block"), block, 0, len(tokens))
        with self._lock:
            return self._open().forward(tokens, block)

    # ---- life ----

    def close(self) -> None:
        """Frees the model. Streams that are still open end with an error."""
        with self._lock:
            self._core = None
            self._inboxes.clear()

    def __repr__(self) -> str:
        if self._core is None:
            return f"<Engine {self._name}, closed>"
        architecture = self.model_config["architecture"]
        return (
            f"<Engine {self._name}: {architecture} on {self.device}, decoder {self.auto_decoder}, "
            f"n_ctx {self.n_ctx}>"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> _core.Engine:
        if self._core is None:
            raise SbdValueError("this engine is closed: make a new one")
        return self._core

    # ---- sequences, for Stream ----

    def _prepare(self, arguments: Mapping[str, Any]) -> _Prepared:
        parameters = parse(arguments)
        if parameters.stop:
            _ = self.tokenizer  # stop strings need text
        if isinstance(parameters.prompt, str):
            ids = self.tokenizer.encode(parameters.prompt)
        else:
            ids = token_ids(parameters.prompt, self.model_config["vocab_size"])
        return _Prepared(parameters, _request(parameters, ids), ids)

    def _add(self, request: _core.Request) -> tuple[int, deque[_core.Event]]:
        inbox: deque[_core.Event] = deque()
        with self._lock:
            sequence = self._open().add(request)
            self._inboxes[sequence] = inbox
        return sequence, inbox

    def _remove(self, sequence: int, finished: bool) -> None:
        with self._lock:
            if self._inboxes.pop(sequence, None) is not None and not finished:
                self._open().remove(sequence)

    def _next_event(self, inbox: deque[_core.Event]) -> _core.Event:
        """A sequence's next event: from its inbox, or from as many forwards as that takes. They
        move every living sequence on, whichever thread asked."""
        while not inbox:
            with self._lock:
                core = self._open()
                if not inbox:
                    core.step(self._inboxes)
        return inbox.popleft()

    def _tokenizer_if_any(self) -> Tokenizer | None:
        try:
            return self.tokenizer
        except SbdValueError:
            return None


class Stream(Iterator[Chunk]):
    """The chunks of one generation. `completion` is the result: final once the stream has ended,
    what there is so far before. Made by Engine.stream."""

    _sequence: int | None = None  # None: ended, or never started

    def __init__(self, engine: Engine, prepared: _Prepared, called: float) -> None:
        self._engine = engine
        self._session = Session(
            prepared.ids, prepared.parameters.stop, engine._tokenizer_if_any(), called
        )
        self._sequence, self._inbox = engine._add(prepared.request)

    @property
    def completion(self) -> Completion:
        return self._session.completion()

    def __next__(self) -> Chunk:
        while self._sequence is not None:
            try:
                event = self._engine._next_event(self._inbox)
            except BaseException:  # a KeyboardInterrupt as well
                self.close()
                raise
            if event.error:
                self._end(finished=True)
                raise SbdValueError(event.error)
            chunk = self._session.absorb(event)
            if chunk.finish_reason:
                self._end(finished=event.finished is not None)
            if event.revealed or chunk.finish_reason:
                return chunk
        raise StopIteration

    def close(self) -> None:
        """Ends the generation where it is; `completion` has all that was committed."""
        finished = False
        while self._sequence is not None and self._inbox and not self._session.finish_reason:
            event = self._inbox.popleft()
            self._session.absorb(event)
            finished = event.finished is not None
        if self._sequence is not None and not self._session.finish_reason:
            self._session.cancel()
        self._end(finished)

    def _end(self, finished: bool) -> None:
        sequence, self._sequence = self._sequence, None
        if sequence is not None:
            self._engine._remove(sequence, finished)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
