"""What JSON can hold, and reading it from anyone."""

from __future__ import annotations

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: they become strings."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str) -> Any:
    """Raises ValueError for all that cannot be read, whatever it is that stops the parser."""
    return _parsed(text)


def parse_strict_json(text: str) -> Any:
    """The same, without the NaN and Infinity that Python adds to JSON."""
    return _parsed(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no number in JSON", name, 0)


def _parsed(text: str, **settings: Any) -> Any:
    try:
        return json.loads(text, **settings)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's limit, with advice for programmers
        raise ValueError("a number of thousands of digits") from None
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
