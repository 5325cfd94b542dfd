"""Calls of functions, told from the text in front of them."""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import replace
from typing import NamedTuple

from ..tools import CallFormat
from .checks import Json
from .constraints import Given
from .fields import Asked
from .model import Model
from .thinking import uncertain
from .tools import Tools

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # as Mistral's templates want it


class Heard(NamedTuple):
    """calls: as a stream tells of them, each with what is new of it."""

    text: str
    calls: list[Json]


class CallSplitter:
    """Takes a text that the format's grammar holds, in pieces. White space in front of calls is no
    text."""

    def __init__(self, form: CallFormat, required: bool) -> None:
        self._form = form
        self._head = re.compile(f"{re.escape(form.opens)}([A-Za-z0-9_-]+){re.escape(form.names)}")
        self._state = "calls" if required else "text"
        self._held = ""
        self._at_start = True  # nothing but white space has come
        self._index = -1
        self._object = _Object()

    def feed(self, piece: str, last: bool = False) -> Heard:
        """`last`: nothing is held back."""
        self._held += piece
        text = self._take_text(last) if self._state == "text" else ""
        calls: list[Json] = []
        while self._take_call(calls):
            pass
        return Heard(text, calls)

    @property
    def whole(self) -> bool:
        """Whether there are calls, and the last has all of its arguments."""
        return self._index >= 0 and self._state == "calls"

    def _take_text(self, last: bool) -> str:
        certain = len(self._held)
        if self._form.mark:
            text, mark, behind = self._held.partition(self._form.mark)
            if mark:
                self._held, self._state = behind, "calls"
                return text.rstrip()
            certain -= 0 if last else uncertain(text, self._form.mark)
        elif self._at_start:
            begin = self._held.lstrip()
            self._at_start = not begin
            if begin.startswith("{"):
                self._state = "calls"
            if begin.startswith("{") or not (begin or last):
                return ""
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _take_call(self, calls: list[Json]) -> bool:
        """Whether there was something that has come to its end."""
        if self._state == "calls":
            head = self._head.search(self._held)
            if head is None:
                return False
            self._held, self._state = self._held[head.end() :], "arguments"
            self._index, self._object = self._index + 1, _Object()
            function = {"name": head[1], "arguments": ""}
            calls.append(
                {"index": self._index, "id": _id(), "type": "function", "function": function}
            )
        if self._state != "arguments":
            return False
        size = self._object.feed(self._held)
        arguments, self._held = self._held[:size], self._held[size:]
        if arguments:
            if not calls or calls[-1]["index"] != self._index:
                calls.append({"index": self._index, "function": {"arguments": ""}})
            calls[-1]["function"]["arguments"] += arguments
        if not self._object.ended:
            return False
        self._state = "calls"
        return True


class _Object:
    """A JSON object that comes in pieces: where it ends."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, piece: str) -> int:
        """How many of the characters are its own."""
        for at, character in enumerate(piece):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return at + 1
        return len(piece)


def _id() -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def with_calls(asked: Asked, tools: Tools, form: CallFormat, model: Model, begun: bool) -> Asked:
    """What is asked, with a grammar of the calls. begun: the prompt has begun what the model
    thinks."""
    grammar = form.grammar(
        model.tokenizer,
        [*tools.functions.values()],
        tools.required,
        tools.parallel,
        begun if model.thinks else None,
    )
    # Marks may be special tokens, and the splitter sees texts.
    arguments = {**asked.arguments, "grammar": grammar, "skip_special_tokens": not form.mark}
    return replace(asked, arguments=arguments, constraint=Given("grammar", grammar, "`tools`"))
