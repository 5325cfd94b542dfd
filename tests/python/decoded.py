"""What a decoder decided against what its reference decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from reference.decoders import Decoded

from sbd_engine.completion import Completion

Result = TypeVar("Result")


def untied(decode: Callable[[int], Result], draws: int = 40) -> tuple[int, Result]:
    """The first draw whose every decision float32 can tell, and what the reference gave for it:
    what it decoded, or a tuple that begins with it."""
    for draw in range(draws):
        result = decode(draw)
        decoded = result if isinstance(result, Decoded) else result[0]  # type: ignore[index]
        if decoded.margin > 1e-4:
            return draw, result
    raise AssertionError(f"{draws} draws in a row with a near tie: the model is degenerate")


def check(actual: Completion, expected: Decoded, what: object) -> None:
    assert actual.tokens == expected.tokens, what
    assert actual.finish_reason == expected.finish_reason, what
    assert actual.stats.nfe == expected.nfe, what
