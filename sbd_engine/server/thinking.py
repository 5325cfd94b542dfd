"""What a model thinks before it answers: text between <think> and </think>."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from ..tools import THINK, THOUGHT


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
            if begin.startswith(THINK):
                self._held, self._state = begin[len(THINK) :], "thought"
            elif last or not THINK.startswith(begin):
                self._state, self._at_start = "answer", False
        if self._state == "thought":
            thought, closed = self._take_thought(last)
            if closed:
                self._state, self._at_start = "answer", True
        return Said(thought, self._take_answer() if self._state == "answer" else "")

    def _take_thought(self, last: bool) -> tuple[str, bool]:
        text, tag, behind = self._held.partition(THOUGHT)
        if tag:
            self._held, text = behind, text.rstrip()
        elif last:
            self._held = ""
        else:  # what may be white space in front of the tag, or a part of it
            certain = len(text) - uncertain(text, THOUGHT)
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


def uncertain(text: str, tag: str) -> int:
    """The characters at its end that may be white space in front of the tag, or a part of it."""
    found = _ending(tag).search(text)
    return len(found[0]) if found else 0


@cache
def _ending(tag: str) -> re.Pattern[str]:
    parts = "|".join(re.escape(tag[:size]) for size in range(len(tag) - 1, 0, -1))
    return re.compile(rf"\s*(?:{parts})?\Z")
