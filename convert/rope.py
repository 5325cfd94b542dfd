"""RoPE's settings, in both of config.json's forms, and what they do to its frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .values import Config, Value, number, positive

TYPES = ("default", "linear", "llama3", "yarn")
# The keys of a ramp's ends, low and high, and what a missing one stands for.
RAMPS: dict[str, dict[str, float | None]] = {
    "llama3": {"low_freq_factor": None, "high_freq_factor": None},
    "yarn": {"beta_slow": 1.0, "beta_fast": 32.0},
}


@dataclass(frozen=True)
class Rope:
    theta: float
    type: str
    factor: float = 1.0
    original_length: int = 0
    low: float = 0.0  # turns within the original length: below, a frequency is divided by `factor`
    high: float = 0.0  # above, it stays as it is
    query_scale: float = 0.0  # beta in q *= 1 + beta ln(1 + floor(position / original_length))


def read_rope(config: Config) -> Rope:
    # Transformers 5 puts in `rope_parameters` what were `rope_theta` and `rope_scaling`.
    values = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        if not isinstance(scaling, dict):
            raise ConvertError(f"config.json: {key}: expected an object, got {scaling!r}")
        values |= scaling
    theta = number(values, "rope_theta", 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in TYPES:
        raise ConvertError(
            f"config.json: RoPE type {kind!r} is not supported: expected one of {', '.join(TYPES)}"
        )
    if values.get("partial_rotary_factor") not in (None, 1.0):
        raise ConvertError(
            f"config.json: partial_rotary_factor: expected 1.0, got "
            f"{values['partial_rotary_factor']!r}"
        )
    if kind == "default":
        return Rope(theta, kind)
    factor = number(values, "factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    values.setdefault(
        "original_max_position_embeddings", config.get("original_max_position_embeddings")
    )
    (low_key, _), (high_key, _) = RAMPS[kind].items()
    low, high = (number(values, key, missing) for key, missing in RAMPS[kind].items())
    if not high > low:
        raise ConvertError(
            f"config.json: {high_key}: expected more than {low_key} {low}, got {high}"
        )
    original = positive(values, "original_max_position_embeddings")
    if kind == "llama3":
        return Rope(theta, kind, factor, original, low, high)
    _check_yarn(values, factor, theta)
    beta = number(values, "llama_4_scaling_beta") if values.get("llama_4_scaling_beta") else 0.0
    return Rope(theta, kind, factor, original, low, high, beta)


def _check_yarn(values: Config, factor: float, theta: float) -> None:
    """YaRN may also multiply cos and sin; the engine has no such factor."""

    def grown(key: str) -> float:
        return 0.1 * number(values, key, 1.0) * math.log(max(factor, 1)) + 1

    if values.get("attention_factor") is not None:
        scale = number(values, "attention_factor")
    elif values.get("mscale") and values.get("mscale_all_dim"):
        scale = grown("mscale") / grown("mscale_all_dim")
    else:
        scale = 0.1 * math.log(max(factor, 1)) + 1
    if scale != 1:
        raise ConvertError(
            f"config.json: YaRN's attention factor: expected 1 (mscale equal to mscale_all_dim), "
            f"got {scale:g}: the engine does not scale cos and sin"
        )
    if values.get("truncate") is False:
        raise ConvertError("config.json: YaRN's truncate: expected true, got false")
    if theta <= 1:
        raise ConvertError(f"config.json: rope_theta: expected more than 1, got {theta:g}")


def rope_metadata(rope: Rope, head_dim: int) -> dict[str, Value]:
    values: dict[str, Value] = {
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope.theta,
    }
    if rope.type == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = rope.factor
    if rope.query_scale:
        values["attention.temperature_scale"] = rope.query_scale
        values["attention.temperature_length"] = rope.original_length
        values["rope.scaling.original_context_length"] = rope.original_length  # llama.cpp's name
    return values


def rope_divisors(rope: Rope, head_dim: int) -> NDArray[np.float32] | None:
    """GGUF's form of a scaling that differs by frequency: what to divide each of the head_dim/2 by.

    None where there is no such scaling. Llama 3 goes from the one end of its ramp to the other by
    turns within the original length, YaRN by the frequency's index, from whole ones.
    """
    index = np.arange(head_dim // 2)
    frequency = rope.theta ** -(2.0 * index / head_dim)
    if rope.type == "llama3":
        turns = rope.original_length * frequency / (2 * math.pi)  # original length / wavelength
        kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    elif rope.type == "yarn":

        def index_of(turns: float) -> float:
            wavelength = rope.original_length / turns
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

        first = max(math.floor(index_of(rope.high)), 0)
        last = min(math.ceil(index_of(rope.low)), head_dim - 1)
        kept = 1 - np.clip((index - first) / (last - first or 0.001), 0, 1)
    else:
        return None
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)
