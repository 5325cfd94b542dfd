"""Tokens to text as they become final: whole characters only, and no stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # of the prompt: enough for the longest character and the space before a word


class Decodes(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Turns one sequence's tokens into text piece by piece.

    A piece is the difference of two decodings of the same window of tokens, so a decoder that
    strips the first space, or needs several tokens for one character, gives the text that it gives
    to the whole. The window begins in the prompt: the text continues it.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        self._window_text = self._whole_characters()
        self._new = 0  # tokens of the window since its text last ended in a whole character

    def feed(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._window.append(token)
        self._new += 1
        decoded = self._tokenizer.decode(self._window)
        whole = decoded.rstrip(_REPLACEMENT)
        piece = whole[len(self._window_text) :]
        if not piece:
            return ""
        self._window_text = whole
        if whole == decoded:  # the next piece needs no more context than this one
            self._window = self._window[-self._new :]
            self._window_text = self._whole_characters()
            self._new = 0
        return piece

    def flush(self) -> str:
        """What is still held back: bytes that never became a character, each shown as U+FFFD."""
        piece = self._tokenizer.decode(self._window)[len(self._window_text) :]
        self._window_text += piece
        return piece

    def _whole_characters(self) -> str:
        return self._tokenizer.decode(self._window).rstrip(_REPLACEMENT)


class StopStrings:
    """Cuts a growing text before the first of some strings, even one that spans several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # given in, not out: may begin a stop string
        self.stopped = False

    def feed(self, piece: str) -> str:
        """The part of the text so far that is now certain to come before any stop string."""
        text = self._held + piece
        begins = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if begins:
            self.stopped = True
            self._held = ""
            return text[: min(begins)]
        certain = len(text) - self._longest_begun(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _longest_begun(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
