"""The texts of one request on their way, side by side in the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ..completion import Chunk, Completion, Scores
from ..errors import SbdError
from ..streams import Delivered
from .errors import ApiError, refused
from .fields import Asked
from .gate import Entry
from .metrics import Seen, Watch
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
        """Of Engine.deliver, for one of the texts. Those of one prompt are samples of one seed."""
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
    events = _Events()
    late = ApiError(504, f"the request took more than its {task.seconds:g} s", code="timeout")
    timer = asyncio.get_running_loop().call_later(task.seconds, events.put, late)
    turns = [
        asyncio.create_task(_Text(task, index, events.put).take_turn(entry))
        for index in range(task.n_texts)
    ]
    try:
        left = task.n_texts
        while left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            left -= isinstance(event, Ended)
            if events:  # others have their turn, and the client may be gone
                await asyncio.sleep(0)
    finally:
        timer.cancel()
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)


class _Events(deque[Event | Exception]):
    """What asyncio.Queue is, for one reader, in a third of its calls: they are made for each chunk,
    all with cold caches."""

    _reader: asyncio.Future[None] | None = None

    def put(self, event: Event | Exception) -> None:
        self.append(event)
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Event | Exception:
        while not self:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self.popleft()


class _Text:
    """One of the request's texts; what happens to it is given to `put`."""

    _generation: Delivered
    _seen: Seen

    def __init__(self, task: Task, index: int, put: Callable[[Event | Exception], None]) -> None:
        self._task, self._index, self._put = task, index, put
        self._over = asyncio.Event()

    async def take_turn(self, entry: Entry) -> None:
        """Waits for a slot, and has it until the text has ended, however slowly it is read."""
        called = perf_counter()
        async with entry.slot():
            with self._task.watch.text(called) as self._seen:
                try:
                    await self._generate()
                except Exception as error:
                    self._fail(error)

    async def _generate(self) -> None:
        engine, asked, index = self._task.model.engine, self._task.asked, self._index
        arguments = self._task.arguments(index)
        scores = None
        if asked.echo and asked.best is not None:
            scores = await asyncio.to_thread(engine.score, arguments["prompt"], asked.best)
        if arguments["max_tokens"] == 0:
            self._seen.outcome = "length"
            self._put(Began(index, scores))
            self._put(Ended(index, None))
            return
        self._generation = self._seen.generation = engine.deliver(self._take, **arguments)
        self._put(Began(index, scores))
        try:
            await self._over.wait()
        finally:
            self._generation.cancel()

    def _take(self, chunk: Chunk | Exception) -> None:
        if isinstance(chunk, Exception):
            self._fail(chunk)
            self._over.set()
            return
        self._seen.add(chunk)
        self._put(Added(self._index, chunk))
        if chunk.finish_reason:
            self._put(Ended(self._index, self._generation.completion))
            self._over.set()

    def _fail(self, error: Exception) -> None:
        self._seen.outcome = "error"
        self._put(error)
