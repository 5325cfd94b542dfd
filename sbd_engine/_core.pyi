from collections import deque
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES: tuple[str, ...]  # of weights

class Event:
    @property
    def committed(self) -> list[int]: ...
    @property
    def revealed(self) -> list[tuple[int, int, float, float]]: ...
    @property
    def finished(self) -> str | None: ...
    @property
    def prompt_rows(self) -> int: ...
    @property
    def error(self) -> str: ...
    @property
    def accepted(self) -> int | None: ...
    @property
    def thought(self) -> bool: ...

class Request:
    prompt: list[int]
    max_tokens: int
    decoder: str
    block_size: int | None
    unmask: str | None
    proxy: str | None
    gamma: float | None
    factor: float | None
    confidence_threshold: float | None
    top_n: int | None
    steps: int | None
    horizon: int | None
    block_add_threshold: float | None
    decoded_token_threshold: float | None
    skip_threshold: float | None
    temperature: float
    top_p: float
    top_k: int
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
        draft_lora: str | PathLike[str] | None = None,
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
    ) -> Engine: ...
    def metadata(self) -> dict[str, Any]: ...
    def model_config(self) -> dict[str, Any]: ...
    def defaults(self) -> dict[str, Any]: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def auto_decoder(self) -> str: ...
    def resolve(self, request: Request) -> dict[str, Any]: ...
    def check(self, request: Request) -> None: ...
    def add(self, request: Request) -> int: ...
    def remove(self, id: int) -> None: ...
    def step(self, inboxes: dict[int, deque[Event]]) -> None: ...
    def forward(self, tokens: list[int], block: int) -> npt.NDArray[np.float32]: ...
    def time_forwards(
        self, rows: list[int], context: int, repeats: int, n_sequences: int = 1
    ) -> list[list[float]]: ...
    def measure_peaks(self) -> dict[str, float]: ...

def read_gguf(path: str | PathLike[str]) -> dict[str, Any]: ...
