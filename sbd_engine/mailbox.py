"""The way of the core's events into an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from . import _core

Take = Callable[[_core.Event], object]

_AT_ONCE = 32  # events


class Mailbox:
    """Hands the events of texts to whoever takes them, all in the event loop where it was made.

    While there are such texts the event loop holds it, and nothing else need: when that closes, the
    texts end.
    """

    def __init__(self, core: _core.Engine) -> None:
        self._takers: dict[int, Take] = {}  # first of all, for __del__
        self.inbox = _core.Inbox(core, driven=True)
        self._in_hand: _core.Event | None = None

    def add(self, request: _core.Request, take: Take) -> int:
        """Starts a text: `take` is called with each of its events. Should it lack memory, it is
        called with that one again; any other error ends the text."""
        loop = asyncio.get_running_loop()
        sequence = self.inbox.add(request)
        try:
            if not self._takers:
                loop.add_reader(self.inbox.bell, self._hand_out)
            self._takers[sequence] = take
        except BaseException:
            self.inbox.cancel(sequence)
            raise
        return sequence

    def _hand_out(self) -> None:
        """As many as may come between the loop's other turns: an engine may be as fast as what is
        done with its events. The bell rings on for others, and for one that lacks memory."""
        with suppress(MemoryError):
            for _ in range(_AT_ONCE):
                event = self._in_hand or self.inbox.next(wait=False)
                if event is None:
                    break
                self._in_hand = event
                self._give(event)
                self._in_hand = None
            if not self._takers:
                asyncio.get_running_loop().remove_reader(self.inbox.bell)

    def _give(self, event: _core.Event) -> None:
        try:
            if take := self._takers.get(event.id):
                take(event)
        except MemoryError:
            raise
        except Exception:  # its taker's fault, for which others do not pay
            self._in_hand = None
            del self._takers[event.id]
            self.inbox.cancel(event.id)
            raise
        if event.last:
            self._takers.pop(event.id, None)

    def __del__(self) -> None:
        for sequence in self._takers:
            self.inbox.cancel(sequence)
