"""The texts of one request on their way, side by side in the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ..completion import Chunk, Completion, Scores
from ..errors import SbdError
from .errors import ApiError, refused
from .fields import Asked
from .gate import Entry
from .metrics import Watch
from .model import Model
from .tools import Tools


@dataclass(frozen=True)
class Began:
    """scores: of the prompt, where they are wanted."""

    index: int
    scores: Scores | None


@dataclass(frozen=True)
class Added:
    index: int
    chunk: Chunk


@dataclass(frozen=True)
class Ended:
    """completion: None where nothing was to be generated."""

    index: int
    completion: Completion | None


Event = Began | Added | Ended


@dataclass(frozen=True)
class Task:
    """A request whose prompts are known. max_tokens: of each of them."""

    model: Model
    asked: Asked
    prompts: Sequence[list[int]]
    max_tokens: Sequence[int]
    param: str  # the field of the prompt
    seconds: float  # that it may take
    watch: Watch

    @property
    def n_texts(self) -> int:
        return self.asked.n_texts

    def arguments(self, index: int) -> dict[str, Any]:
        """Of Engine.astream, for one of the texts. Those of one prompt are samples of one seed."""
        prompt, sample = divmod(index, self.asked.n)
        return {
            **self.asked.arguments,
            "prompt": self.prompts[prompt],
            "max_tokens": self.max_tokens[prompt],
            "sample_index": sample,
        }

    def check(self) -> None:
        """Raises ApiError for what the engine would refuse."""
        try:
            self._check()
        except ApiError as error:
            if self.asked.tools and error.param == "tools":
                self._check_each(self.asked.tools)
            raise

    def _check_each(self, tools: Tools) -> None:
        """Names the one, of many that came together, that is refused alone."""
        for where, function in tools.functions.items():
            param = f"{where}.parameters"
            try:
                self.model.engine.check([0], decoder="ntp", json_schema=function.schema)
            except SbdError as error:
                raise ApiError(400, str(error).replace("`json_schema`", param), param) from None

    def _check(self) -> None:
        room = 0 if self.max_tokens[0] == 0 else 1
        for index, prompt in enumerate(self.prompts):
            self.model.check_length(prompt, room, self.param)
            arguments = self.arguments(index * self.asked.n)
            if room == 0:  # the prompt is only scored, and may be as long as the context
                self.model.check_tokens(prompt, self.param)
                arguments |= {"prompt": prompt[:1], "max_tokens": 1}
            try:
                self.model.engine.check(**arguments)
            except SbdError as error:
                raise self._refused(error) from None

    def _refused(self, error: SbdError) -> ApiError:
        constraint = self.asked.constraint
        if constraint is None:
            return refused(error, self.param)
        return refused(error, self.param, {constraint.argument: constraint.field})


async def run(task: Task, entry: Entry) -> AsyncGenerator[Event, None]:
    """What happens to the request's texts, in the order that it does, each one's from Began to
    Ended. Closing it frees their sequences. Raises ApiError and SbdError."""
    events: asyncio.Queue[Event | Exception] = asyncio.Queue()
    late = ApiError(504, f"the request took more than its {task.seconds:g} s", code="timeout")
    timer = asyncio.get_running_loop().call_later(task.seconds, events.put_nowait, late)
    texts = [
        asyncio.create_task(_generate(task, index, entry, events)) for index in range(task.n_texts)
    ]
    try:
        left = len(texts)
        while left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            left -= isinstance(event, Ended)
    finally:
        timer.cancel()
        for text in texts:
            text.cancel()
        await asyncio.gather(*texts, return_exceptions=True)


async def _generate(
    task: Task,
    index: int,
    entry: Entry,
    events: asyncio.Queue[Event | Exception],
) -> None:
    model, asked = task.model, task.asked
    arguments = task.arguments(index)
    called = perf_counter()
    async with entry.slot():
        with task.watch.text(called) as seen:
            try:
                scores = None
                if asked.echo and asked.best is not None:
                    ids = arguments["prompt"]
                    scores = await asyncio.to_thread(model.engine.score, ids, asked.best)
                if arguments["max_tokens"] == 0:
                    seen.outcome = "length"
                    events.put_nowait(Began(index, scores))
                    events.put_nowait(Ended(index, None))
                    return
                async with aclosing(model.engine.astream(**arguments)) as stream:
                    seen.stream = stream
                    events.put_nowait(Began(index, scores))
                    async for chunk in stream:
                        seen.add(chunk)
                        events.put_nowait(Added(index, chunk))
                    events.put_nowait(Ended(index, stream.completion))
            except Exception as error:
                seen.outcome = "error"
                events.put_nowait(error)
