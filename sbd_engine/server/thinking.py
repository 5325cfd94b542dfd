"""What a model thinks before it answers: text between <think> and </think>."""

from __future__ import annotations

import re
from typing import NamedTuple

_OPEN, _CLOSE = "<think>", "</think>"


class Said(NamedTuple):
    thought: str
    answer: str


class ThinkingSplitter:
    """Tells the two apart in a text that comes in pieces. White space around the tags is neither.

    begun: the prompt has opened the thinking. Without a tag in front all is the answer.
    """

    def __init__(self, begun: bool) -> None:
        self._state = "thought" if begun else "open"
        self._held = ""
        self._at_start = True  # white space in front is left out

    def feed(self, piece: str, last: bool = False) -> Said:
        """`last`: nothing is held back."""
        self._held += piece
        thought = ""
        if self._state == "open":
            begin = self._held.lstrip()
            if begin.startswith(_OPEN):
                self._held, self._state = begin[len(_OPEN) :], "thought"
            elif last or not _OPEN.startswith(begin):
                self._state, self._at_start = "answer", False
        if self._state == "thought":
            thought, closed = self._take_thought(last)
            if closed:
                self._state, self._at_start = "answer", True
        return Said(thought, self._take_answer() if self._state == "answer" else "")

    def _take_thought(self, last: bool) -> tuple[str, bool]:
        text, tag, behind = self._held.partition(_CLOSE)
        if tag:
            self._held, text = behind, text.rstrip()
        elif last:
            self._held = ""
        else:  # what may be white space in front of the tag, or a part of it
            certain = len(text) - len(_end_of_thought(text))
            self._held, text = text[certain:], text[:certain]
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text, bool(tag)

    def _take_answer(self) -> str:
        text, self._held = self._held, ""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text


_PARTS = "|".join(re.escape(_CLOSE[:size]) for size in range(len(_CLOSE) - 1, 0, -1))
_END = re.compile(rf"\s*(?:{_PARTS})?\Z")


def _end_of_thought(text: str) -> str:
    found = _END.search(text)
    return found[0] if found else ""
