"""Values out of a config.json, each with its check."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

from gguf import GGUFValueType

from .errors import ConvertError

Config = dict[str, Any]  # as in config.json
Value = bool | int | float | str | list[str] | list[int] | list[float]  # of the model file


class Typed(NamedTuple):
    """A value in the type of GGUF's that another file has it in; `inner`: of an array's values."""

    value: Any
    kind: GGUFValueType
    inner: GGUFValueType | None


_FLOAT32_MAX = (2 - 2**-23) * 2.0**127

# What the engine's reader takes: numbers of these ranges, and at most so many of what it counts, so
# that nothing is counted out that no model has.
RANGES = {"rms_norm_eps": (1e-12, 0.999), "rope_theta": (1, _FLOAT32_MAX)}
MOST = {
    "num_hidden_layers": 1 << 12,
    "hidden_size": 1 << 18,
    "num_attention_heads": 1 << 18,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 27,
}
LEAST = {"max_position_embeddings": 2}  # a token, and one to come behind it


def positive(values: Config, key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConvertError(f"config.json: {key}: expected a positive integer, got {value!r:.60}")
    if value > MOST.get(key, value):
        raise ConvertError(f"config.json: {key}: expected at most {MOST[key]}, got {value}")
    if value < LEAST.get(key, 1):
        raise ConvertError(f"config.json: {key}: expected at least {LEAST[key]}, got {value}")
    return value


def number(values: Config, key: str, default: float | None = None) -> float:
    value = default if values.get(key) is None else values[key]
    low, high = RANGES.get(key, (0, _FLOAT32_MAX))
    if not is_finite(value) or not (value > 0 and low <= value <= high):
        expected = f"a number from {low:g} to {high:g}" if key in RANGES else "a positive number"
        raise ConvertError(f"config.json: {key}: expected {expected}, got {value!r:.60}")
    return float(value)


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that a model file's float can hold; JSON's may be NaN or have a
    thousand digits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -_FLOAT32_MAX <= value <= _FLOAT32_MAX
