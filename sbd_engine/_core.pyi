from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES: tuple[str, ...]  # of weights
DRAFTING: tuple[str, ...]  # decoders that draft, and may do so with an adapter

Scored = tuple[int, float, int, list[tuple[int, float]]]

class Event:
    @property
    def id(self) -> int: ...
    @property
    def last(self) -> bool: ...
    # committed, revealed, finished, scores, (prompt_rows, cached_tokens),
    # (accepted, guesses, kind), ran_thinking, the seconds since it happened
    def read(
        self,
    ) -> tuple[
        list[int],
        list[tuple[int, int, float, float]],
        str | None,
        list[Scored],
        tuple[int, int],
        tuple[int | None, int, str | None],
        bool,
        float,
    ]: ...

class Option:
    """An option of decoding: a line of the engine's table."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...  # in a model file, behind "sbd."
    @property
    def older_key(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def type(self) -> str: ...  # "int", "float" or "str"
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def expected(self) -> str: ...  # the range in words
    def holds(self, value: float) -> bool: ...
    @property
    def choices(self) -> list[str]: ...
    @property
    def default(self) -> int | float | str | None: ...  # where a file has no key; None: unset
    @property
    def decoders(self) -> list[str]: ...  # that read it

OPTIONS: tuple[Option, ...]

class Grammar:
    """What texts must be."""

class Choices(Grammar):
    def __init__(
        self, texts: list[list[int]], vocab_size: int, eos_token_ids: list[int]
    ) -> None: ...

class LlguidanceGrammar(Grammar):
    def __init__(
        self, matcher: object, name: str, vocab_size: int, end: int, eos_token_ids: list[int]
    ) -> None: ...

class Request:
    prompt: list[int]
    max_tokens: int
    decoder: str
    options: dict[str, int | float | str]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    logit_bias: Sequence[tuple[int, float]]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int | None
    grammar: Grammar  # only to be set
    seed: int
    sample_index: int
    ignore_eos: bool

class Engine:
    def __init__(
        self,
        path: str | PathLike[str],
        device: str,
        n_threads: int,
        n_ctx: int,
        kv_dtype: str,
        kv_budget: int | None = None,
        prefix_cache: int | None = 0,
        draft: str | PathLike[str] | None = None,
    ) -> None: ...
    @staticmethod
    def random(
        metadata: dict[str, Any],
        dtype: str,
        tie: bool,
        device: str,
        n_threads: int,
        n_ctx: int,
        kv_dtype: str,
        kv_budget: int | None = None,
        prefix_cache: int | None = 0,
        draft: str | PathLike[str] | None = None,
    ) -> Engine: ...
    def metadata(self) -> dict[str, Any]: ...
    def model_config(self) -> dict[str, Any]: ...
    def defaults(self) -> dict[str, Any]: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def kv_budget(self) -> int: ...
    @property
    def prefix_cache(self) -> int: ...
    @property
    def kv_positions(self) -> int: ...
    @property
    def decoders(self) -> list[str]: ...
    @property
    def usage(self) -> dict[str, int]: ...
    @property
    def device(self) -> str: ...
    @property
    def auto_decoder(self) -> str: ...
    @property
    def n_sequences(self) -> int: ...
    def resolve(self, request: Request) -> dict[str, Any]: ...
    def check(self, request: Request) -> None: ...
    def forward(self, tokens: list[int], block: int) -> npt.NDArray[np.float32]: ...
    def score(self, tokens: list[int], top: int) -> list[Scored]: ...
    def time_forwards(
        self,
        rows: list[int],
        context: int,
        repeats: int,
        n_sequences: int = 1,
        adapted: bool = False,
    ) -> list[list[float]]: ...
    def input_squares(
        self, tokens: list[int]
    ) -> dict[str, tuple[int, npt.NDArray[np.float64]]]: ...
    def profile_forward(self, rows: int, context: int) -> dict[str, Any]: ...
    def measure_peaks(self) -> dict[str, float]: ...
    def close(self) -> None: ...

class Inbox:
    def __init__(self, engine: Engine, driven: bool = False) -> None: ...
    def add(self, request: Request) -> int: ...
    def cancel(self, id: int) -> None: ...
    def next(self, wait: bool = True, gather: bool = False) -> Event | None: ...
    @property
    def bell(self) -> int: ...

def best_lossless(
    ms_by_rows: dict[int, float], agreement: float, sequences: int = 1
) -> tuple[int, bool, bool, float]: ...
def read_gguf(path: str | PathLike[str]) -> dict[str, Any]: ...
