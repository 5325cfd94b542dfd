"""Values out of a config.json, each with its check."""

from __future__ import annotations

import math
from typing import Any

from .errors import ConvertError

Config = dict[str, Any]  # as in config.json
Value = bool | int | float | str | list[str] | list[int] | list[float]  # of the model file


def positive(values: Config, key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConvertError(f"config.json: {key}: expected a positive integer, got {value!r}")
    return value


def number(values: Config, key: str, default: float | None = None) -> float:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConvertError(f"config.json: {key}: expected a positive number, got {value!r}")
    return float(value)
