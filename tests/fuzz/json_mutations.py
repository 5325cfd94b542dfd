"""Mutations of what JSON holds: other values, parts of others, parts twice or not at all."""

from __future__ import annotations

from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**30),
    *(0.0, -0.5, 1e-300, 1e308, float("inf"), float("nan")),
    *("", " ", "a", "\n", "\0", "\x1b[2J", "\u202e", "\ud800", "é", "🙂", "▁", "Ġ", "<unk>"),
    *("a" * 1000, "../x", "/etc/passwd", "(a|a)*$", ".*", "(", "[^a]", "$A", "[]"),
    *([], {}, [[]], [{}], {"": None}, {"a": []}, [0, 1], ["a", "b"]),
)
MOST_PARTS = (
    20_000  # of a list or text that is repeated: the fuzzer's own time is none of the engine's
)


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index) in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        part = waiting.pop()
        inner = part.items() if isinstance(part, dict) else enumerate(part)
        for key, each in inner:
            found.append((part, key))
            if isinstance(each, (dict, list)):
                waiting.append(each)
    return found


def mutated(random: Random, value: Any, others: list[Any], times: int) -> Any:
    """A copy of it, changed. others: where parts may come from."""
    value = copied(value)
    for _ in range(times):
        found = places(value)
        if not found:
            return value
        part, key = random.choice(found)
        kind = random.randrange(8)
        if kind < 3:
            part[key] = copied(random.choice(ODD))
        elif kind == 3:
            other, name = random.choice(places(random.choice(others)) or [([0], 0)])
            part[key] = copied(other[name])
        elif kind == 4:
            del part[key]
        elif kind == 5 and isinstance(part, list):
            copies = random.choice((2, 3, 20))
            part *= copies if copies * len(part) <= MOST_PARTS else 1
        elif kind == 6 and isinstance(part, dict):
            other, name = random.choice(places(random.choice(others)) or [({}, "a")])
            part[str(name)] = copied(other[name]) if other else None
        elif isinstance(part[key], str):
            part[key] = _text(random, part[key])
        elif isinstance(part[key], int):
            part[key] = part[key] + random.choice((-1, 1, 100))
    return value


def _text(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    return random.choice(
        (
            text[:at],
            text[at:],
            text[:at] + random.choice(("a", "\n", "é", "\0", "*", "(", "\u202e")) + text[at:],
            text[:MOST_PARTS] * random.choice((2, 3, 50)),
        )
    )
