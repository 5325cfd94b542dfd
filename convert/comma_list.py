"""Lists that are written with commas between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
N = TypeVar("N", int, float)


def parsed(text: str, parse: Callable[[str], T]) -> list[T]:
    """The parts in their order. What `parse` raises of one, this raises."""
    return [parse(part) for part in text.split(",")]


def ascending(text: str, parse: Callable[[str], N], low: N) -> list[N]:
    """Numbers, each once. Raises ValueError where one is below `low`."""
    values: list[N] = []
    for value in parsed(text, parse):
        if not value >= low:  # NaN too
            raise ValueError
        values.append(value)
    return sorted(set(values))
