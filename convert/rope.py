"""RoPE's settings, in all of config.json's forms, as transformers takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .values import Config, Value, number, positive

# Dynamic scaling begins behind max_position_embeddings, which the engine's context ends at.
TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
LENGTH = "original_max_position_embeddings"
FORMS = ("rope_scaling", "rope_parameters")
KEYS = {
    *("rope_theta", "rope_type", "type", "factor", LENGTH),
    *("low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast", "truncate"),
    *("attention_factor", "mscale", "mscale_all_dim", "llama_4_scaling_beta"),
    *("partial_rotary_factor", "max_position_embeddings", "finetuned"),
}
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
    attention_factor: float = 1.0  # cosines and sines are multiplied by it
    query_scale: float = 0.0  # beta in q *= 1 + beta ln(1 + floor(position / original_length))


def read_rope(config: Config) -> Rope:
    values = _settings(config)
    theta = number(values, "rope_theta", 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in TYPES:
        raise ConvertError(
            f"config.json: RoPE type {kind!r:.60} is not supported: expected one of "
            f"{', '.join(TYPES)}"
        )
    if values.get("partial_rotary_factor") not in (None, 1.0):
        raise ConvertError(
            f"config.json: partial_rotary_factor: expected 1.0, got "
            f"{values['partial_rotary_factor']!r:.60}"
        )
    beta = number(values, "llama_4_scaling_beta") if values.get("llama_4_scaling_beta") else 0.0
    factor = 1.0 if kind == "default" else number(values, "factor")
    rope = Rope(theta, kind, factor, _whole_length(values), query_scale=beta)
    if kind not in RAMPS:
        return rope
    (low_key, _), (high_key, _) = RAMPS[kind].items()
    low, high = (number(values, key, missing) for key, missing in RAMPS[kind].items())
    if not high > low:
        raise ConvertError(
            f"config.json: {high_key}: expected more than {low_key} {low}, got {high}"
        )
    if kind == "llama3":
        return replace(rope, low=low, high=high)
    if values.get("truncate") not in (None, True):
        raise ConvertError(
            f"config.json: YaRN's truncate: expected True, got {values['truncate']!r:.60}"
        )
    if theta <= 1:
        raise ConvertError(f"config.json: rope_theta: expected more than 1, got {theta:g}")
    attention = _attention_factor(values, factor)
    return replace(rope, low=low, high=high, attention_factor=attention)


def _settings(config: Config) -> Config:
    """The one object that counts, completed by what stands outside of it.

    Transformers 5 puts in `rope_parameters` what were `rope_theta` and `rope_scaling`; where both
    are there, `rope_scaling` (added by hand, as model cards say) takes the other's place whole.
    """
    forms = {key: config.get(key) or {} for key in FORMS}
    for key, form in forms.items():
        if not isinstance(form, dict):
            raise ConvertError(f"config.json: {key}: expected an object, got {form!r:.60}")
        for name, value in form.items():
            if isinstance(value, dict):
                raise ConvertError(
                    f"config.json: {key}: {name!r:.60}: expected one object for all layers, got "
                    "one for each kind of them"
                )
            if name not in KEYS and value:
                raise ConvertError(
                    f"config.json: {key}: unknown key {name!r:.60}: expected some of "
                    f"{', '.join(sorted(KEYS))}"
                )
    scaling, parameters = forms.values()
    theta = config.get("rope_theta")
    if scaling and scaling.get("rope_theta") is None and theta is None:
        hidden = parameters.get("rope_theta")
        if hidden not in (None, 10000.0):
            raise ConvertError(
                f"config.json: rope_theta: {hidden!r:.60} in rope_parameters, whose place "
                "rope_scaling takes: expected it in rope_scaling too"
            )
    values = {"rope_theta": theta, LENGTH: config["max_position_embeddings"]}
    values |= {key: value for key, value in (scaling or parameters).items() if value is not None}
    if config.get(LENGTH) is not None:
        values[LENGTH] = config[LENGTH]
    return values


def _whole_length(values: Config) -> int:
    """Of tokens, though often written as a float."""
    length = number(values, LENGTH)
    return positive({LENGTH: int(length) if length.is_integer() else length}, LENGTH)


def _attention_factor(values: Config, factor: float) -> float:
    """What YaRN multiplies cosines and sines with: given, or from its factor."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(max(factor, 1)) + 1

    if values.get("attention_factor") is not None:
        return number(values, "attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        return grown(number(values, "mscale")) / grown(number(values, "mscale_all_dim"))
    return grown(1.0)


def rope_metadata(rope: Rope, head_dim: int) -> dict[str, Value]:
    values: dict[str, Value] = {
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope.theta,
    }
    if rope.type in ("linear", "yarn"):
        values["rope.scaling.type"] = rope.type
        values["rope.scaling.factor"] = rope.factor
    if rope.query_scale:
        values["attention.temperature_scale"] = rope.query_scale
        values["attention.temperature_length"] = rope.original_length
    if rope.type == "yarn" or rope.query_scale:
        values["rope.scaling.original_context_length"] = rope.original_length
    if rope.type == "yarn":
        values["rope.scaling.yarn_beta_fast"] = rope.high
        values["rope.scaling.yarn_beta_slow"] = rope.low
        # Readers multiply it by what the factor alone gives.
        of_factor = _attention_factor({}, rope.factor)
        values["rope.scaling.attn_factor"] = rope.attention_factor / of_factor
    return values


def rope_divisors(rope: Rope, head_dim: int) -> NDArray[np.float32] | None:
    """GGUF's form of Llama 3's scaling: what to divide each of the head_dim/2 frequencies by.

    None where there is no such scaling. It goes from the one end of its ramp to the other by turns
    within the original length.
    """
    if rope.type != "llama3":
        return None
    frequency = rope.theta ** -(2.0 * np.arange(head_dim // 2) / head_dim)
    turns = rope.original_length * frequency / (2 * math.pi)  # original length / wavelength
    kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)
