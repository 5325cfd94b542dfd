"""Blocks as they fill, told apart from the text that is final."""

from __future__ import annotations

from collections.abc import Callable

from ..completion import Chunk
from .checks import Json
from .texts import Task


class BlockEvents:
    """Of one text: where it starts, and what each forward decided."""

    def __init__(self, index: int, task: Task) -> None:
        self._index, self._task = index, task
        self._piece: Callable[[int], str] = task.model.piece
        self._forwards = self._committed = 0

    def start(self) -> Json:
        arguments = self._task.arguments(self._index)
        prompt = arguments.pop("prompt")
        in_force = self._task.model.engine.resolve(**arguments)
        asked = self._task.asked
        # A lossless decoder chooses a size each time, unless one is asked for.
        own = in_force["decoder"] in ("sbd_lossless", "nemotron_spec")
        size = asked.arguments.get("block_size") if own else in_force.get("block_size")
        return self._event(
            start={
                "decoder": in_force["decoder"],
                "block_size": size,
                "prompt_tokens": len(prompt),
                "max_tokens": arguments["max_tokens"],
                "seed": asked.seed,
            }
        )

    def forward(self, chunk: Chunk) -> Json:
        self._forwards += 1
        self._committed += len(chunk.tokens)
        revealed = [
            {
                "position": each.position,
                "token": each.token,
                "text": self._piece(each.token),
                "probability": each.probability,
                "entropy": each.entropy,
            }
            for each in chunk.revealed
        ]
        return self._event(forward=self._forwards, revealed=revealed, committed=self._committed)

    def _event(self, **values: object) -> Json:
        return {"choices": [], "sbd": {"index": self._index, **values}}
