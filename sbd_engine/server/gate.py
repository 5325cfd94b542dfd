"""How many texts run at once, and how many may wait for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

from .errors import ApiError

_RETRY_SECONDS = 1


class Gate:
    """parallel: texts that run together; the others wait in the order they came. max_queue: of
    texts that wait; a request is let in while there are fewer, with all of its own."""

    def __init__(self, parallel: int, max_queue: int) -> None:
        self._most = parallel + max_queue
        self._slots = asyncio.Semaphore(parallel)
        self._inside = self.running = 0

    @property
    def waiting(self) -> int:
        return self._inside - self.running

    @contextmanager
    def entry(self, texts: int) -> Iterator[Entry]:
        """For a request, from when it comes to when it ends. Raises ApiError where it is full."""
        if self._inside >= self._most:
            raise ApiError(
                429,
                f"{self.running} texts are generated and {self.waiting} wait: try again later",
                code="queue_full",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )
        self._inside += texts
        entry = Entry(self, texts)
        try:
            yield entry
        finally:
            self._inside -= entry.left

    @asynccontextmanager
    async def slot(self, entry: Entry) -> AsyncIterator[None]:
        """For one of the request's texts, while it runs."""
        async with self._slots:
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1
                self._inside -= 1
                entry.left -= 1


class Entry:
    """A request that is in: left, its texts that have not had their turn."""

    def __init__(self, gate: Gate, left: int) -> None:
        self._gate, self.left = gate, left

    def slot(self) -> AbstractAsyncContextManager[None]:
        return self._gate.slot(self)
