"""What a chat's user says: a message or command at a time, from a terminal or a pipe."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from ..errors import SbdValueError
from ..text_file import decode_utf8
from . import options

_QUOTES = '"""'


class Said(NamedTuple):
    """quoted: it is a message, whatever it begins with."""

    text: str
    quoted: bool


class Input(ABC):
    """A line is a message. One that ends with a backslash goes on in the next; what begins with
    three quotes goes on to the next three."""

    def next(self) -> Said | None:
        """None at the end."""
        while (line := self._line("> ")) is not None:
            if line.lstrip().startswith(_QUOTES):
                return Said(self._quoted(line.lstrip()[len(_QUOTES) :]), True)
            if text := self._continued(line).strip():
                return Said(text, False)
        return None

    def _continued(self, line: str) -> str:
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(". ") or ""
        return "\n".join([*lines, line])

    def _quoted(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            following = self._line(". ")
            if following is None:
                raise SbdValueError(f"expected {_QUOTES} at the end of a message, got none")
            line = following
        lines.append(line.rstrip()[: -len(_QUOTES)])
        return "\n".join(lines).strip("\n")

    @abstractmethod
    def _line(self, prompt: str) -> str | None:
        """The next; None at the end."""


class Piped(Input):
    def __init__(self) -> None:
        self._numbers = count(1)

    def _line(self, prompt: str) -> str | None:
        data = sys.stdin.buffer.readline()
        source = f"line {next(self._numbers)} of standard input"
        return decode_utf8(data, source).rstrip("\r\n") if data else None


class Typed(Input):
    """At a terminal. Ctrl-C drops what is typed, where nothing is it ends the chat, told first.

    words: what Tab completes.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._warned = False
        try:
            import readline
        except ImportError:  # a Python without: the terminal's own editing is left
            return
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, n: [*(w for w in words if w.startswith(text)), None][n])
        readline.parse_and_bind("tab: complete")

    def next(self) -> Said | None:
        while True:
            try:
                said = super().next()
            except _Dropped:
                continue
            self._warned = False
            return said

    def _line(self, prompt: str) -> str | None:
        try:
            return self._ask(prompt)
        except EOFError:
            print(file=sys.stderr)
            return None
        except UnicodeDecodeError as error:
            raise SbdValueError(
                f"expected UTF-8 text, got byte 0x{error.object[error.start]:02x}"
            ) from None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if prompt == "> " and not _line_buffer():
                if self._warned:
                    raise
                self._warned = True
                options.note("Ctrl-C once more ends the chat, as /quit and Ctrl-D do")
            raise _Dropped from None

    def _ask(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # standard output has the answers alone
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class _Dropped(Exception):
    """The message that was being typed."""


def _line_buffer() -> str:
    """What stood in the line that was interrupted."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""
