"""Answers to a request for text, as one object or as a stream of server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from functools import cache

from .. import __version__
from ..completion import Completion
from ..errors import SbdError
from .blocks import BlockEvents
from .checks import Json
from .choices import Choice
from .errors import ApiError, failed
from .fields import StreamOptions
from .gate import Entry
from .texts import Added, Began, Ended, Event, Task, run

_DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Answer:
    """kind: "chat.completion" or "text_completion"."""

    def __init__(self, kind: str, id: str, task: Task, choices: Sequence[Choice]) -> None:
        self._kind, self._task, self._choices = kind, task, choices
        self._ended: dict[int, Completion] = {}
        self._head: Json = {
            "id": id,
            "object": kind,
            "created": int(time.time()),
            "model": task.model.alias,
            "system_fingerprint": f"sbd-engine-{version()}",
        }

    async def whole(self, entry: Entry) -> Json:
        async with aclosing(run(self._task, entry)) as events:
            async for event in events:
                choice = self._choices[event.index]
                if isinstance(event, Began):
                    choice.begin(event.scores)
                elif isinstance(event, Added):
                    choice.add(event.chunk)
                else:
                    self._end(choice, event)
        return {
            **self._head,
            "choices": [choice.whole() for choice in self._choices],
            "usage": self.usage(),
            "seed": self._task.asked.seed,
        }

    async def stream(self, options: StreamOptions, entry: Entry) -> AsyncGenerator[bytes, None]:
        """Lines of the stream. What fails before the first of them is raised."""
        kind = {"chat.completion": "chat.completion.chunk"}.get(self._kind, self._kind)
        head = _encode({**self._head, "object": kind})[:-1]  # the same in each line
        blocks = None
        if options.sbd_blocks:
            blocks = [BlockEvents(index, self._task) for index in range(self._task.n_texts)]
        begun = False
        try:
            async with aclosing(run(self._task, entry)) as events:
                async for event in events:
                    for told in self._told(event, blocks[event.index] if blocks else None):
                        begun = True
                        yield _line(f"{head},{_encode(told)[1:]}")
            if options.include_usage:
                usage = _encode({"choices": [], "usage": self.usage()})
                yield _line(f"{head},{usage[1:]}")
            yield _DONE
        except (ApiError, SbdError) as error:
            if not begun:
                raise
            yield _line(_encode(failed(error).body()))

    def usage(self) -> Json:
        """Of what has ended so far. Samples of one prompt share it."""
        task, done = self._task, self._ended.values()
        prompt_tokens = sum(map(len, task.prompts))
        completion_tokens = sum(len(each.tokens) for each in done)
        nfe = sum(each.stats.nfe for each in done)
        first = (self._ended.get(index) for index in range(0, task.n_texts, task.asked.n))
        cached = sum(each.stats.cached_tokens for each in first if each)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "nfe": nfe,
            "tokens_per_forward": round(completion_tokens / nfe, 4) if nfe else 0.0,
        }

    def figures(self) -> Json:
        """For the log."""
        usage = self.usage()
        return {
            "prompt": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "tokens": usage["completion_tokens"],
            "nfe": usage["nfe"],
        }

    def _told(self, event: Event, blocks: BlockEvents | None) -> Iterator[Json]:
        """What a stream tells of an event: blocks apart from text that is final."""
        choice = self._choices[event.index]
        if isinstance(event, Began):
            if blocks is not None:
                yield blocks.start()
            said = choice.begin(event.scores)
        elif isinstance(event, Added):
            if blocks is not None:
                yield blocks.forward(event.chunk)
            said = choice.add(event.chunk)
        else:
            said = self._end(choice, event)
        if said is not None:
            seed = {} if said["finish_reason"] is None else {"seed": self._task.asked.seed}
            yield {"choices": [said], **seed}

    def _end(self, choice: Choice, event: Ended) -> Json | None:
        if event.completion is None:
            return choice.end_unasked()
        self._ended[event.index] = event.completion
        return None


@cache
def version() -> str:
    return str(__version__)


def _line(text: str) -> bytes:
    return f"data: {text}\n\n".encode()
