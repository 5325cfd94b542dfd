"""The engine for callers: prompts in, text out."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from . import _core
from .choosing import choice_probabilities
from .completion import Chunk, Completion, Scores, Usage
from .errors import SbdError, SbdGrammarError, SbdTypeError, SbdValueError, brief
from .grammars import Grammars
from .mailbox import Mailbox
from .model_file import ModelPath, existing, model_file
from .parameters import (
    MAX_BEST,
    Parameters,
    Prompt,
    TokenIds,
    integer,
    named,
    one_of,
    parse,
    token_ids,
    without_other_constraint,
)
from .session import Session
from .sizes import shown
from .streams import AsyncStream, Delivered, Prepared, Stream
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from .parameters import Options

_MAX_IN_FLIGHT = 16  # sequences of generate_batch that share a forward
_MAX_BYTES = 2**63 - 1
# In other words there, or not at all.
_NOT_IN_REQUEST = ("prompt", "stop", "skip_special_tokens", "constraint")
_REQUEST_FIELDS = [f.name for f in fields(Parameters) if f.name not in _NOT_IN_REQUEST]
_DEFAULTS = {f.name: f.default for f in fields(Parameters)}
_RULES = ("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _of_batch(index: int, error: SbdError) -> SbdError:
    return type(error)(f"prompt {index} of the batch: {error}")


def engine_options(
    device: str,
    n_threads: int | None,
    n_ctx: int | None,
    kv_dtype: str,
    kv_budget: int | None = None,
    prefix_cache: int | None = 0,  # what is measured computes every prompt
) -> dict[str, Any]:
    """The core's options (its defaults are 0 of n_threads and n_ctx, None of bytes) after a
    check."""
    if not isinstance(device, str):
        raise SbdTypeError(f"expected {named('device')} as a string, got {brief(device)}")
    if n_threads is not None and device.startswith("cuda"):
        raise SbdValueError(
            f"{named('n_threads')} has no effect with device {device}: leave it out, or use "
            f"{named('device')} cpu"
        )
    if kv_budget is not None:
        kv_budget = integer(named("kv_budget"), kv_budget, 1, _MAX_BYTES)
    if prefix_cache is not None:
        prefix_cache = integer(named("prefix_cache"), prefix_cache, 0, _MAX_BYTES)
        if kv_budget is not None and prefix_cache > kv_budget:
            raise SbdValueError(
                f"expected {named('prefix_cache')} within the {named('kv_budget')} of {kv_budget} "
                f"bytes, got {prefix_cache}"
            )
    return {
        "device": device,
        "n_threads": 0 if n_threads is None else integer(named("n_threads"), n_threads, 1),
        "n_ctx": 0 if n_ctx is None else integer(named("n_ctx"), n_ctx, 1),
        "kv_dtype": one_of(named("kv_dtype"), kv_dtype, ("f16", "bf16", "f32", "q8_0")),
        "kv_budget": kv_budget,
        "prefix_cache": prefix_cache,
    }


class Engine:
    """A loaded model.

    path: a model file; None is the embedded demo model. device: "auto" (a GPU where one can be
    used), "cpu", "cuda" or "cuda:N". n_threads: of the CPU; None is one per available core. n_ctx:
    positions of the KV cache of each sequence; None is the model's. kv_dtype: "f16", "bf16",
    "f32" or, on the CPU for heads of a multiple of 32 values, "q8_0", half of f16's bytes.
    draft: a file with an adapter that drafts for this model; its text stays the same, and "auto"
    is a decoder that drafts. draft_lora is another name of it.

    kv_budget: bytes that the KV caches of all sequences may take; None is nine tenths of the
    memory that is free once the model is loaded. What a text will likely come to need, by those
    that ended before, is set aside when it starts: others wait for room, one that outgrows it may
    pause until another has ended, and one that could never fit is refused. prefix_cache: bytes
    of these that ended texts may leave for later ones whose prompts begin alike, such as a chat's
    next turn (`stats.cached_tokens` counts what was found); the least recently used go first, and
    all of them for a text that needs the room. None is a quarter of the kv_budget; 0 keeps
    nothing, so that who measures computes every prompt. No bit of a result depends on either on
    the CPU.

    Safe to use from several threads: sequences that are alive at the same time share forwards, and
    the result of one does not depend on the others.

    Raises SbdFileError (an OSError), SbdValueError, SbdTypeError, SbdMemoryError and, where a GPU
    fails, SbdDeviceError.
    """

    def __init__(
        self,
        path: ModelPath | None = None,
        device: str = "auto",
        n_threads: int | None = None,
        n_ctx: int | None = None,
        kv_dtype: str = "f16",
        draft: ModelPath | None = None,
        kv_budget: int | None = None,
        prefix_cache: int | None = None,
        *,
        draft_lora: ModelPath | None = None,
    ) -> None:
        options = engine_options(device, n_threads, n_ctx, kv_dtype, kv_budget, prefix_cache)
        if draft is not None and draft_lora is not None:
            raise SbdTypeError(
                f"expected one of {named('draft')} and {named('draft_lora')}, its other name, got "
                "both"
            )
        draft = draft_lora if draft is None else draft
        adapter = None if draft is None else existing(draft, named("draft"))
        with model_file(path) as file:
            self._name = file.name
            self._core = _core.Engine(file, **options, draft=adapter)
        # Each as long as it has texts: then its event loop holds it, and this the loop.
        self._mailboxes = WeakValueDictionary[asyncio.AbstractEventLoop, Mailbox]()
        self._tokenizer_if_any()  # loaded now, so that the first call does not wait for it

    # ---- what the model is ----

    @cached_property
    def config(self) -> dict[str, Any]:
        """All metadata of the model file, by key."""
        return self._core.metadata()

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """Shapes and architecture, in the words of a Hugging Face config.json."""
        return self._core.model_config()

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What decoding takes from the file: block_size, unmask, gamma, ..."""
        return self._core.defaults()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises SbdValueError where it has none."""
        return Tokenizer(
            self.config, self.model_config["eos_token_ids"], self.model_config["mask_token_id"]
        )

    @property
    def auto_decoder(self) -> str:
        """What decoder="auto" stands for with this file."""
        return self._core.auto_decoder

    @property
    def device(self) -> str:
        """The backend and its instruction set, such as "cpu (avx512)"."""
        return self._core.device

    @property
    def n_threads(self) -> int:
        return self._core.n_threads

    @property
    def n_ctx(self) -> int:
        return self._core.n_ctx

    @property
    def kv_budget(self) -> int:
        """Bytes that the KV caches of all sequences may take."""
        return self._core.kv_budget

    @property
    def prefix_cache(self) -> int:
        """Bytes of the kv_budget that ended texts may leave for later ones."""
        return self._core.prefix_cache

    @property
    def kv_positions(self) -> int:
        """Tokens of the longest text, prompt and all, that the kv_budget could hold."""
        return self._core.kv_positions

    @property
    def decoders(self) -> list[str]:
        """Those that can run with this file."""
        return self._core.decoders

    @property
    def usage(self) -> Usage:
        """What the engine has done so far, and what its caches take now."""
        return Usage(**self._core.usage)

    # ---- generation ----

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Generates up to max_tokens tokens after `prompt`, a string or token ids.

        Options, of which None is the default, and that the model file's where it has one:
          max_tokens=256, stop=() (a string or several), ignore_eos=False,
          skip_special_tokens=True (the text is without them);
          decoder="auto" | "ntp" | "sbd" | "sbd_lossless" | "dmtd" | "d2f" | a family's own name;
          blocks: block_size=None (tokens), unmask=None ("entropy_bounded" | "factor" |
          "confidence" | "top_n"), gamma=None (nats), proxy=None ("entropy" | "confidence" |
          "margin" | "position"), factor=None, confidence_threshold=None (a probability),
          top_n=None (tokens per forward), steps=None (forwards per block that top_n is spread
          over);
          dmtd: horizon=None (tokens per pass of all layers); d2f: block_add_threshold=None and
          decoded_token_threshold=None (shares of a block), skip_threshold=None (a probability);
          temperature=0.0, top_p=1.0, top_k=0, min_p=0.0 (a share of the highest probability:
          less probable tokens are left out), seed=0, sample_index=0 (tells samples of one seed
          apart);
          logit_bias=None ({token id: number}, added to its logit: -100 all but forbids a token,
          100 all but forces it);
          repetition_penalty=1.0 (positive logits of the tokens of prompt and text are divided by
          it, negative ones multiplied), presence_penalty=0.0 and frequency_penalty=0.0 (-2 to 2:
          taken off the logits of the tokens of the new text, once and for each time);
          logprobs=None (0 to 20: `completion.logprobs` has each token's log-probability, and that
          of so many most probable tokens in its place);
          one of json_schema=None (a dict, or JSON), regex=None, grammar=None (Lark's syntax) and
          choices=None (strings): what the text must be.
        "sbd" is Set Block Decoding (arXiv 2509.04185, Algorithms 2 and 3): each forward decides
        some of a block's masked positions, at least one. Which, `unmask` says: "entropy_bounded",
        in the order of entropy, the most whose entropies but the last sum up to at most gamma (eq.
        8; in the order of another proxy, but the largest: eq. 18); "factor", the n most confident
        ones, n the largest with (n + 1)(1 - confidence) < factor; "confidence", those above
        confidence_threshold, and no fewer than top_n; "top_n", so many. "dmtd" is of arXiv
        2510.11958, "d2f" of 2508.09192.

        Bias, repetition penalty, the other penalties, temperature, top_k, top_p, min_p: so they
        follow each other. Log-probabilities are of the model's own distribution, before all of
        them; entropies and probabilities, and so what the unmasking rules see, are behind bias and
        penalties. "ntp", "dmtd", "sbd_lossless" and "nemotron_spec" decide from left to right:
        what penalties count, and a log-probability stands behind, is all the text before the token.
        The others decide a block's positions in any order: penalties count what earlier forwards
        have decided, on either side, and not what the same forward decides; a log-probability is
        that of the forward that decided the token, when part of its block was still masked.

        Under a constraint each token is taken among those that it allows at its place, and what it
        forces is taken without asking the model, as the tokenizer splits it. The text ends with an
        end-of-sequence token, which is among `tokens`, where the model chooses one that the
        constraint allows; where only an end is possible it just ends, with no such token. A text
        that `max_tokens` cuts is the beginning of a valid one. Compiled by llguidance: JSON is
        compact, its properties in the schema's order; regular expressions are of Rust's syntax, and
        match the whole text. "d2f", "llada" and "dream" take no constraint, and refuse it.

        A file without a tokenizer takes token ids and gives no text.

        Raises SbdTypeError for an unknown argument or one of another type. SbdValueError: a bad
        value; an option that has no effect with the decoder, its unmasking rule or temperature 0
        (a seed is always welcome); a prompt that is empty, or leaves no room in the context; a
        decoder that the file cannot run; stop strings or text without a tokenizer; logits that are
        not finite; an engine that is closed, or was in a forward when its process was forked.
        SbdMemoryError: no memory for the KV cache, or a text that the kv_budget could never hold.
        SbdDeviceError: the GPU failed, and every engine of the process on it. Each is an SbdError.
        """
        called = time.perf_counter()
        prepared = self._prepare({"prompt": prompt, **options})
        with Stream(self._core, prepared, called, gather=not prepared.ends_by_text) as stream:
            for _ in stream:
                pass
            return stream.completion

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Like `generate`, as an iterator: one Chunk for each forward that decided something.
        Closing or dropping it frees its sequence; `completion` has the result and the stats."""
        called = time.perf_counter()
        return Stream(self._core, self._prepare({"prompt": prompt, **options}), called)

    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Like `stream`, for `async for`; the event loop never waits for a forward. Leaving the
        loop, `aclose()`, and cancelling the task that reads it free the sequence at once."""
        called = time.perf_counter()
        prepared = self._prepare({"prompt": prompt, **options})
        return AsyncStream(self._mailbox_here(), prepared, called)

    def deliver(
        self,
        take: Callable[[Chunk | Exception], None],
        prompt: Prompt,
        **options: Unpack[Options],
    ) -> Delivered:
        """Like `astream`, for who reads many texts in one event loop: `take` is called there with
        each Chunk as it comes, and with the error where the text ends in one. It may not raise, nor
        wait. The text goes on until its end, `cancel()` of what is returned, or the loop's."""
        called = time.perf_counter()
        prepared = self._prepare({"prompt": prompt, **options})
        return Delivered(self._mailbox_here(), prepared, called, take)

    def check(self, prompt: Prompt, **options: Unpack[Options]) -> None:
        """Raises what `generate` would before it starts."""
        self._core.check(self._prepare({"prompt": prompt, **options}).request)

    def generate_batch(
        self, prompts: Iterable[Prompt | Mapping[str, Any]], **options: Unpack[Options]
    ) -> list[Completion]:
        """Generates for several prompts at once; the results are in order and each is what
        `generate` gives alone. The options are for all; a prompt in a dict of `generate`'s
        arguments has its own in front of them. All are checked before any starts."""
        done = dict(self._completions(self._prepare_all(prompts, options), _MAX_IN_FLIGHT))
        return [done[number] for number in range(len(done))]

    def generate_each(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        *,
        at_once: int = _MAX_IN_FLIGHT,
        **options: Unpack[Options],
    ) -> Generator[tuple[int, Completion], None, None]:
        """The same, each as soon as it ends, with its number among the prompts. `at_once` of them
        share forwards. Closing the iterator frees those that are still on their way."""
        at_once = integer(named("at_once"), at_once, 1)
        return self._completions(self._prepare_all(prompts, options), at_once)

    def _prepare_all(
        self, prompts: Iterable[Prompt | Mapping[str, Any]], options: Mapping[str, Any]
    ) -> deque[tuple[int, Prepared]]:
        """Each with its number."""
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise SbdTypeError(
                "expected a list of prompts, or of dicts of generate's arguments, "
                f"got {type(prompts).__name__}"
            )
        waiting: deque[tuple[int, Prepared]] = deque()
        for index, item in enumerate(prompts):
            try:
                own = item if isinstance(item, Mapping) else {"prompt": item}
                prepared = self._prepare({**without_other_constraint(options, own), **own})
                self._core.check(prepared.request)
            except SbdError as error:
                raise _of_batch(index, error) from None
            waiting.append((index, prepared))
        return waiting

    def _completions(
        self, waiting: deque[tuple[int, Prepared]], at_once: int
    ) -> Generator[tuple[int, Completion], None, None]:
        inbox = _core.Inbox(self._core)
        gather = not any(prepared.ends_by_text for _, prepared in waiting)
        running: dict[int, tuple[int, Session]] = {}  # by sequence
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    index, prepared = waiting.popleft()
                    sequence = inbox.add(prepared.request)
                    running[sequence] = index, prepared.session(time.perf_counter())
                event = inbox.next(gather=gather)
                assert event  # until a sequence has had its last, one comes
                if event.id not in running:
                    continue
                index, session = running[event.id]
                try:
                    chunk = session.absorb(event)
                except SbdGrammarError as error:  # all other errors are every text's
                    raise _of_batch(index, error) from None
                if chunk.finish_reason:  # a stop string, perhaps
                    inbox.cancel(event.id)
                    del running[event.id]
                    yield index, session.completion()
        finally:
            for sequence in running:
                inbox.cancel(sequence)

    def resolve(self, **options: Unpack[Options]) -> dict[str, Any]:
        """What these options come to with this model: the decoder, and the options that decide what
        it does, the file's own where none is given."""
        parameters = parse({"prompt": [0], **options})
        request = self._request(parameters, [0])
        self._core.check(request)
        resolved = self._core.resolve(request)
        general = ["max_tokens", "ignore_eos", "temperature"]
        if parameters.temperature > 0:
            general += ["top_k", "top_p", "min_p", "seed", "sample_index"]
        general += [name for name in _RULES if getattr(parameters, name) != _DEFAULTS[name]]
        values = {name: getattr(parameters, name) for name in general}
        if "logit_bias" in values:
            values["logit_bias"] = dict(parameters.logit_bias)
        if parameters.constraint is not None:
            kind, source = parameters.constraint
            values[kind] = json.loads(source) if kind in ("json_schema", "choices") else source
        return {**resolved, **values, "stop": list(parameters.stop)}

    def forward(self, ids: TokenIds, block: int = 0) -> npt.NDArray[np.float32]:
        """Raw logits [len(ids), vocab_size] of an uncached forward: the last `block` rows see each
        other (one block), the rest are causal."""
        tokens = token_ids(ids, self.model_config["vocab_size"])
        block = integer(named("block"), block, 0, len(tokens))
        return self._core.forward(tokens, block)

    def score(self, text: Prompt, top: int = 0) -> Scores:
        """The log-probability of each token of a text, a string or token ids, behind those before
        it, its rank, and `top` most probable tokens in its place (0 to 20). The text is read as a
        prompt is, in causal rows, and may be as long as the context.

        Raises SbdTypeError and SbdValueError.
        """
        tokens = self._tokens_of(parse({"prompt": text}).prompt)
        rows = self._core.score(tokens, integer(named("top"), top, 0, MAX_BEST))
        return Scores(
            tokens,
            [None, *(logprob for _, logprob, _, _ in rows)],
            [None, *(rank for _, _, rank, _ in rows)],
            [[], *(best for _, _, _, best in rows)],
        )

    def input_squares(self, text: Prompt) -> dict[str, tuple[int, npt.NDArray[np.float64]]]:
        """What the layers' weights are multiplied by while a text is read, all but its last token.

        Of each, by its name in the model file, the number of rows, and the sum of squares of each
        column. On the CPU.

        Raises SbdTypeError and SbdValueError.
        """
        return self._core.input_squares(self._tokens_of(parse({"prompt": text}).prompt))

    def choice_probabilities(self, prompt: Prompt, choices: Sequence[str]) -> dict[str, float]:
        """The probability with which next-token decoding under `choices`, at temperature 1, says
        each of them behind the prompt; they sum to 1. All are computed, each of its tokens in a
        row; what they have in common may be shared (prefix_cache).

        Raises SbdTypeError and SbdValueError.
        """
        parameters = parse({"prompt": prompt, "choices": () if choices is None else choices})
        assert parameters.constraint
        different = json.loads(parameters.constraint.source)
        return choice_probabilities(self, self._tokens_of(parameters.prompt), different)

    # ---- life ----

    def close(self) -> None:
        """Frees the model. Generations that are still on their way end with an error, at once."""
        self._core.close()

    def __repr__(self) -> str:
        try:
            return (
                f"<Engine {self._name}: {self.model_config['architecture']} on {self.device}, "
                f"decoder {self.auto_decoder}, n_ctx {self.n_ctx}, "
                f"kv_budget {shown(self.kv_budget)}, prefix_cache {shown(self.prefix_cache)}>"
            )
        except SbdValueError:
            return f"<Engine {self._name}, closed>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise SbdTypeError("an Engine cannot be pickled: make one in every process")

    def _prepare(self, arguments: Mapping[str, Any]) -> Prepared:
        parameters = parse(arguments)
        if parameters.stop:
            _ = self.tokenizer  # stop strings need text
        ids = self._tokens_of(parameters.prompt)
        request = self._request(parameters, ids)
        stop, skipped = parameters.stop, parameters.skip_special_tokens
        return Prepared(request, ids, stop, self._tokenizer_if_any(), skipped)

    def _request(self, parameters: Parameters, ids: list[int]) -> _core.Request:
        request = _core.Request()
        request.prompt = ids
        for name in _REQUEST_FIELDS:
            setattr(request, name, getattr(parameters, name))
        if parameters.constraint is not None:
            request.grammar = self._grammars.get(parameters.constraint)
        return request

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.model_config["vocab_size"])

    def _tokens_of(self, text: Prompt) -> list[int]:
        if isinstance(text, str):
            return self.tokenizer.encode(text, fits=self.n_ctx)
        return token_ids(text, self.model_config["vocab_size"])

    def _mailbox_here(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = Mailbox(self._core)
        return mailbox

    def _tokenizer_if_any(self) -> Tokenizer | None:
        try:
            return self.tokenizer
        except SbdValueError:
            return None
