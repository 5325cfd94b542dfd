"""What each family's config.json means: the GGUF metadata, and which tensor becomes which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError

Value = bool | int | float | str | list[str] | list[int] | list[float]
Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How a model_type differs from Llama."""

    architecture: str  # GGUF's name
    interleaved: bool = False  # GGUF wants Q and K rows in interleaved-rotary order
    qkv_bias: bool = False  # biases on q, k, v always; else `attention_bias` says, and o has one
    qk_norm: bool = False
    head_dim: int | None = None  # where the config has none; else hidden_size / heads


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2", qkv_bias=True),
    "qwen3": Family("qwen3", qk_norm=True, head_dim=128),
}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class TensorSpec:
    name: str  # in the model file
    source: str  # in the checkpoint
    shape: tuple[int, ...]
    rotary_head_dim: int = 0  # > 0: rows are put in interleaved-rotary order, head by head


@dataclass(frozen=True)
class Rope:
    theta: float
    type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0


def model_metadata(config: Config) -> dict[str, Value]:
    """GGUF's metadata of a model, from the dict in its Hugging Face config.json.

    Raises ConvertError where the model is none that this program knows, naming the key.
    """
    family = _family(config)
    rope = _rope(config)
    heads, head_dim = _positive(config, "num_attention_heads"), _head_dim(config)
    values: dict[str, Value] = {
        "context_length": _positive(config, "max_position_embeddings"),
        "embedding_length": _positive(config, "hidden_size"),
        "block_count": _positive(config, "num_hidden_layers"),
        "feed_forward_length": _positive(config, "intermediate_size"),
        "vocab_size": _positive(config, "vocab_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps", 1e-6),
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope.theta,
    }
    if rope.type == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = rope.factor
    window = sliding_window(config)
    if window is not None:
        values["attention.sliding_window"] = window
    architecture = family.architecture
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in values.items()
    }


def tensor_specs(config: Config, *, tied: bool) -> list[TensorSpec]:
    """Every weight of the model, in the order of its use; `tied` has no head of its own."""
    return list(_tensor_specs(config, tied))


def _tensor_specs(config: Config, tied: bool) -> Iterator[TensorSpec]:
    family = _family(config)
    hidden, inner = _positive(config, "hidden_size"), _positive(config, "intermediate_size")
    vocab, head_dim = _positive(config, "vocab_size"), _head_dim(config)
    q, kv = _positive(config, "num_attention_heads") * head_dim, _kv_heads(config) * head_dim
    rotary = head_dim if family.interleaved else 0
    biased = "qkv" if family.qkv_bias else "qkvo" if config.get("attention_bias") else ""

    yield TensorSpec("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))
    for i in range(_positive(config, "num_hidden_layers")):
        blk, layer = f"blk.{i}", f"model.layers.{i}"
        yield TensorSpec(f"{blk}.attn_norm.weight", f"{layer}.input_layernorm.weight", (hidden,))
        for part, name, rows, columns, permuted in (
            ("q", "attn_q", q, hidden, rotary),
            ("k", "attn_k", kv, hidden, rotary),
            ("v", "attn_v", kv, hidden, 0),
            ("o", "attn_output", hidden, q, 0),
        ):
            source = f"{layer}.self_attn.{part}_proj"
            yield TensorSpec(f"{blk}.{name}.weight", f"{source}.weight", (rows, columns), permuted)
            if part in biased:
                yield TensorSpec(f"{blk}.{name}.bias", f"{source}.bias", (rows,), permuted)
        if family.qk_norm:
            for part in "qk":
                source = f"{layer}.self_attn.{part}_norm.weight"
                yield TensorSpec(f"{blk}.attn_{part}_norm.weight", source, (head_dim,))
        source = f"{layer}.post_attention_layernorm.weight"
        yield TensorSpec(f"{blk}.ffn_norm.weight", source, (hidden,))
        yield TensorSpec(f"{blk}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", (inner, hidden))
        yield TensorSpec(f"{blk}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", (inner, hidden))
        yield TensorSpec(f"{blk}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", (hidden, inner))
    yield TensorSpec("output_norm.weight", "model.norm.weight", (hidden,))
    if not tied:
        yield TensorSpec("output.weight", "lm_head.weight", (vocab, hidden))


def interleave_rotary(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of each head from the order 0, 1, 2, ... to 0, d/2, 1, d/2 + 1, ...: pairs adjoin."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def rope_freqs(config: Config) -> NDArray[np.float32] | None:
    """Llama 3's RoPE scaling as GGUF has it: what to divide each of the head_dim/2 frequencies by.

    None where the config has no such scaling.
    """
    rope = _rope(config)
    if rope.type != "llama3":
        return None
    head_dim = _head_dim(config)
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_length * frequency / (2 * math.pi)  # original length / wavelength
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)


def sliding_window(config: Config) -> int | None:
    """The window, where transformers would really apply one to some layer."""
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", 4096)
    elif config["model_type"] in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        window = config.get("sliding_window", 4096)
        full_layers = config.get("max_window_layers", 28)
        if not config.get("layer_types") and full_layers >= config["num_hidden_layers"]:
            window = None
    else:
        return None
    if config.get("layer_types") and "sliding_attention" not in config["layer_types"]:
        return None
    return None if window is None else _positive({"sliding_window": window}, "sliding_window")


def _family(config: Config) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConvertError(
            f"config.json: model_type {model_type!r} is not supported: expected one of "
            f"{', '.join(FAMILIES)}"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConvertError(
            f"config.json: the checkpoint is already quantised ({method or 'quantization_config'}):"
            " give the original, in BF16, F16 or F32"
        )
    for key, expected in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
    ):
        value = config.get(key)
        if value is not None and value != expected:
            raise ConvertError(f"config.json: {key}: expected {expected!r}, got {value!r}")
    return FAMILIES[model_type]


def _rope(config: Config) -> Rope:
    # Transformers 5 puts in `rope_parameters` what were `rope_theta` and `rope_scaling`.
    values = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        if not isinstance(scaling, dict):
            raise ConvertError(f"config.json: {key}: expected an object, got {scaling!r}")
        values |= scaling
    theta = _number(values, "rope_theta", 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConvertError(
            f"config.json: RoPE type {kind!r} is not supported: expected one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    if values.get("partial_rotary_factor") not in (None, 1.0):
        raise ConvertError(
            f"config.json: partial_rotary_factor: expected 1.0, got "
            f"{values['partial_rotary_factor']!r}"
        )
    if kind == "default":
        return Rope(theta, kind)
    factor = _number(values, "factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    values.setdefault(
        "original_max_position_embeddings", config.get("original_max_position_embeddings")
    )
    low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
    if not high > low:
        raise ConvertError(
            f"config.json: high_freq_factor: expected more than low_freq_factor {low}, got {high}"
        )
    original = _positive(values, "original_max_position_embeddings")
    return Rope(theta, kind, factor, low, high, original)


def _head_dim(config: Config) -> int:
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    head_dim = config.get("head_dim") or _family(config).head_dim
    if head_dim is None:
        if hidden % heads:
            raise ConvertError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        head_dim = hidden // heads
    head_dim = _positive({"head_dim": head_dim}, "head_dim")
    if head_dim % 2:
        raise ConvertError(f"config.json: head_dim: expected an even number, got {head_dim}")
    return head_dim


def _kv_heads(config: Config) -> int:
    heads = _positive(config, "num_attention_heads")
    key = "num_key_value_heads"
    kv_heads = heads if config.get(key) is None else _positive(config, key)
    if heads % kv_heads:
        raise ConvertError(
            f"config.json: num_attention_heads {heads} is not a multiple of {key} {kv_heads}"
        )
    return kv_heads


def _positive(values: Config, key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConvertError(f"config.json: {key}: expected a positive integer, got {value!r}")
    return value


def _number(values: Config, key: str, default: float | None = None) -> float:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConvertError(f"config.json: {key}: expected a positive number, got {value!r}")
    return float(value)
