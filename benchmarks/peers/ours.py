"""sbd-engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbd_engine import Engine, SbdError, __version__, _core, roofline

from .worker import Missing


class Forwards:
    """Single forwards, timed by the engine itself."""

    def __init__(self, path: str, threads: int, n_ctx: int) -> None:
        self._core = _core.Engine(
            path, device="auto", n_threads=threads, n_ctx=n_ctx, kv_dtype="f16"
        )
        self.about = f"sbd-engine {__version__}, {self._core.device}"

    def time(
        self, rows: int, context: int, repeats: int, setting: dict[str, Any]
    ) -> Sequence[float]:
        """The rows are one block; every row's statistics are made, from logits that are consumed
        where they are computed."""
        return self._core.time_forwards([rows], context, repeats)[0]

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], setting: dict[str, Any]
    ) -> NDArray[np.float32]:
        return self._core.forward([*prompt, *tokens], 0)[len(prompt) :]

    def machine(self) -> dict[str, float]:
        return roofline.measure(self._core)


class Generations:
    """Whole generations, through the interface that everyone uses."""

    def __init__(self, path: str, threads: int, n_ctx: int, draft: str | None = None) -> None:
        # Prompts come again in every round.
        self._engine = Engine(path, n_threads=threads, n_ctx=n_ctx, prefix_cache=0, draft=draft)
        self.about = f"sbd-engine {__version__}, {self._engine.device}"

    def generate(self, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        """When each forward that decided tokens ended, in seconds from the first of them, and how
        many it decided."""
        ends, decided = [], []
        with self._engine.stream(list(prompt), **options) as stream:
            for chunk in stream:
                ends.append(time.perf_counter())
                decided.append(len(chunk.revealed))
            tokens = stream.completion.tokens
        return {"seconds": [end - ends[0] for end in ends], "decided": decided, "tokens": tokens}

    def answers(self, prompts: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
        """Of all prompts at once: tokens of each, their forwards (each sequence's own), seconds."""
        started = time.perf_counter()
        done = self._engine.generate_batch([list(prompt) for prompt in prompts], **options)
        return {
            "tokens": [completion.tokens for completion in done],
            "forwards": sum(completion.stats.nfe for completion in done),
            "seconds": time.perf_counter() - started,
        }


def load(options: dict[str, Any]) -> Forwards | Generations:
    try:
        return Generations(**options) if options.pop("generate", False) else Forwards(**options)
    except SbdError as error:
        raise Missing(str(error)) from None
