"""Tokens to text as they become final: whole characters only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # of the prompt: enough for the longest character and the space before a word
_CHARACTER_BYTES = 4  # at most, and as many tokens
_PENDING_TOKENS = 8
_PROMPT_TOKENS = _CONTEXT_TOKENS + 2 * _CHARACTER_BYTES


class Decodes(Protocol):
    """With a `joins_bytes` that is true, where decoding only joins the tokens' bytes."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Turns one sequence's tokens into text piece by piece.

    A piece is what decoding adds to the text that is out, in a window of a few tokens: those whose
    text is out, for context, and those that wait for the rest of a character. So a decoder that
    strips the first space, or needs several tokens for one character, gives the text that it gives
    to the whole. The window begins in the prompt: the text continues it. Where decoding only joins
    the tokens' bytes, what waits is all that there is in a window.

    A token that is one byte has its own trap: decoders take those in a row as text in whole or not
    at all, so that one missing byte takes back what was whole before it.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._keeps_context = not getattr(tokenizer, "joins_bytes", False)
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = ""  # what of the window's text is out
        context, pending = self._end_of(list(prompt[-_PROMPT_TOKENS:]))
        self._go_on_from(context)
        if pending:
            self._pending = pending
            whole = self._decode(self._context + pending).rstrip(_REPLACEMENT)
            if whole.startswith(self._shown):
                self._shown = whole

    def feed(self, *tokens: int) -> str:
        """The text that the tokens complete; "" while a character is incomplete."""
        if len(tokens) > 1:
            return self._whole(tokens) or "".join(map(self._feed, tokens))
        return self._feed(*tokens)

    def _whole(self, tokens: Sequence[int]) -> str:
        """Their text at once, where it ends in a whole character; else "", and nothing is fed."""
        text = self._decode(self._context + self._pending + [*tokens])
        if text.endswith(_REPLACEMENT) or not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        if piece:
            self._go_on_from([*self._pending, *tokens])
        return piece

    def _feed(self, token: int) -> str:
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if not text.startswith(self._shown):  # bytes in a row: the new ones begin anew
            self._context, self._shown = [], ""
            text = self._decode(self._pending)
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[len(self._shown) :]
        if whole != text:
            return self._bytes_after_junk() or self._incomplete(text, piece)
        if piece:
            self._go_on_from(self._pending)
        elif len(self._pending) > _PENDING_TOKENS:  # tokens without text
            del self._pending[0]
        return piece

    def flush(self) -> str:
        """What is still held back: bytes that never became a character, each shown as U+FFFD."""
        if not self._pending:
            return ""
        piece = self._rest(self._pending)
        self._go_on_from(self._pending)
        return piece

    def _end_of(self, prompt: list[int]) -> tuple[list[int], list[int]]:
        """The prompt's last tokens: those to begin with that end in a whole character, and those
        of a character that it leaves incomplete. A window must not begin within bytes in a row at
        a place that makes it none."""
        for left in range(_CHARACTER_BYTES):
            end = len(prompt) - left
            for more in range(_CHARACTER_BYTES):
                window = prompt[max(0, end - _CONTEXT_TOKENS - more) : end]
                if not self._decode(window).endswith(_REPLACEMENT):
                    return window, prompt[end:]
        return prompt[-_CONTEXT_TOKENS:], []

    def _go_on_from(self, tokens: list[int]) -> None:
        """All text is out, and `tokens` are the context of what follows."""
        self._context, self._pending = tokens if self._keeps_context else [], []
        self._shown = self._decode(self._context) if self._context else ""

    def _rest(self, pending: list[int]) -> str:
        text = self._decode(self._context + pending)
        broken = not text.startswith(self._shown)
        return self._decode(pending) if broken else text[len(self._shown) :]

    def _bytes_after_junk(self) -> str:
        """The text where the last bytes are a character, which those before them hid."""
        for size in range(1, min(_CHARACTER_BYTES + 1, len(self._pending))):
            character = self._decode(self._pending[-size:])
            if character and _REPLACEMENT not in character:
                piece = self._rest(self._pending[:-size]) + character
                self._go_on_from(self._pending[-size:])
                return piece
        return ""

    def _incomplete(self, text: str, piece: str) -> str:
        """`piece` is whole, `text` ends within a character: that of the last few tokens."""
        self._shown += piece
        if len(self._pending) <= _PENDING_TOKENS:
            return piece
        pending = self._pending[-_CHARACTER_BYTES:]
        window = self._decode(pending)
        held = min(
            _CHARACTER_BYTES - 1, *(len(t) - len(t.rstrip(_REPLACEMENT)) for t in (text, window))
        )
        piece += text[len(self._shown) : len(text) - held]
        self._context, self._pending = [], pending
        self._shown = window[: len(window) - held]
        return piece
