"""What llguidance does not refuse of a JSON Schema or a grammar, and cannot keep texts to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .endless import endless_part
from .endless_rules import endless_rule
from .errors import SbdValueError, brief

_MOST_INTEGER = 1 << 53
_LEAST, _MOST, _DIGITS = 1e-6, 1e15, 15  # of numbers that are no integers


def check_ends(name: str, schema: Any) -> None:
    """Raises SbdValueError where a part that texts may come to never does."""
    _check_part(name, endless_part(schema), whole="#")


def check_rules_end(name: str, grammar: str) -> None:
    """The same of a Lark grammar's rules."""
    _check_part(name, endless_rule(grammar), whole="start")


def _check_part(name: str, endless: str | None, whole: str) -> None:
    if endless is not None:
        where = "" if endless == whole else f" once it comes to {brief(endless)}"
        raise SbdValueError(
            f"{name} never ends{where}: what it needs there needs another of itself in it"
        )


def check_constants(name: str, schema: Any) -> None:
    """Raises SbdValueError for those that would be others in a text. Before llguidance sees it."""
    for number in _constants(schema):
        if not _is_exact(number):
            raise SbdValueError(
                f"{name}: expected numbers in `const` and `enum` of at most {_DIGITS} digits, and "
                f"integers up to 2^53, as others would be rounded, got {brief(number)}"
            )


def _constants(schema: Any) -> Iterator[int | float]:
    """Numbers that a text must have as they are."""
    waiting = [(schema, False)]
    while waiting:
        part, constant = waiting.pop()
        if isinstance(part, dict):
            waiting += ((each, constant or key in ("const", "enum")) for key, each in part.items())
        elif isinstance(part, list):
            waiting += ((each, constant) for each in part)
        elif constant and isinstance(part, (int, float)):
            yield part


def _is_exact(number: float) -> bool:
    """Beyond this llguidance rounds, and fails where an integer comes to -2^63."""
    if isinstance(number, int):
        return abs(number) <= _MOST_INTEGER
    fits = number == 0 or _LEAST <= abs(number) < _MOST
    return fits and float(f"{number:.{_DIGITS}g}") == number
