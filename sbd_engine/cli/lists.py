"""Options whose value is a list of numbers with commas."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..convert.comma_list import ascending
from ..errors import SbdValueError
from ..parameters import integer

N = TypeVar("N", int, float)


def integers(name: str, text: str, low: int) -> list[int]:
    """Ascending, each once; so are `floats`."""
    return _numbers(name, text, lambda part: integer(name, int(part), low), low, "integers")


def floats(name: str, text: str, low: float) -> list[float]:
    return _numbers(name, text, float, low, "numbers")


def _numbers(name: str, text: str, parse: Callable[[str], N], low: N, what: str) -> list[N]:
    try:
        return list(ascending(text, parse, low))
    except ValueError:
        raise SbdValueError(
            f"expected {name} as {what} >= {low:g} with commas, got {text!r}"
        ) from None
