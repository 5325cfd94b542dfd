"""What a run does when it is told to end."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = b"interrupted: saving behind this step; once more ends at once\n"
GRACE = 1.0  # seconds in which a signal is the same one again: torchrun passes on what it got


class Interruption:
    """Inside `with`, notes the first Ctrl-C or SIGTERM; a second one is a KeyboardInterrupt."""

    def __init__(self, speaks: bool = True) -> None:
        self.signal: int | None = None
        self._speaks = speaks
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Interruption:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as behind nohup
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if self._speaks:
                os.write(2, NOTE)  # not print: it may have been interrupted in one
        elif time.monotonic() - self._since > GRACE:
            raise KeyboardInterrupt
