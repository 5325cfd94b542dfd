"""What a checkpoint becomes in GGUF: the model's metadata, and which tensor goes where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConvertError
from .families import family_of, hf_config
from .rope import read_rope, rope_divisors, rope_metadata
from .values import Config, Value, number, positive


@dataclass(frozen=True)
class TensorSpec:
    name: str  # in the model file
    source: str  # in the checkpoint
    shape: tuple[int, ...]
    rotary_head_dim: int = 0  # > 0: rows are put in interleaved-rotary order, head by head


def model_metadata(config: Config) -> dict[str, Value]:
    """GGUF's metadata of a model, from the dict in its Hugging Face config.json.

    Raises ConvertError where the model is none that this program knows, naming the key.
    """
    config = hf_config(config)
    heads, head_dim = positive(config, "num_attention_heads"), _head_dim(config)
    values: dict[str, Value] = {
        "context_length": positive(config, "max_position_embeddings"),
        "embedding_length": positive(config, "hidden_size"),
        "block_count": positive(config, "num_hidden_layers"),
        "feed_forward_length": positive(config, "intermediate_size"),
        "vocab_size": positive(config, "vocab_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": number(config, "rms_norm_eps", 1e-6),
    }
    architecture, rope = family_of(config).architecture, read_rope(config)
    if rope.query_scale and architecture != "mistral3":
        raise ConvertError(
            f"config.json: llama_4_scaling_beta: expected none in a {config['model_type']} model, "
            f"got {rope.query_scale:g}"
        )
    values |= rope_metadata(rope, head_dim)
    window = sliding_window(config)
    if window is not None:
        values["attention.sliding_window"] = window
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in values.items()
    }


def tensor_specs(config: Config, *, tied: bool) -> list[TensorSpec]:
    """Every weight of the model, in the order of its use; `tied` has no head of its own."""
    return list(_tensor_specs(config, tied))


def _tensor_specs(config: Config, tied: bool) -> Iterator[TensorSpec]:
    config = hf_config(config)
    family = family_of(config)
    names = family.names
    hidden, inner = positive(config, "hidden_size"), positive(config, "intermediate_size")
    vocab, head_dim = positive(config, "vocab_size"), _head_dim(config)
    q, kv = positive(config, "num_attention_heads") * head_dim, _kv_heads(config) * head_dim
    rotary = head_dim if family.interleaved else 0
    biased = "qkv" if family.qkv_bias else "qkvo" if config.get("attention_bias") else ""

    yield TensorSpec("token_embd.weight", f"{names.embedding}.weight", (vocab, hidden))
    for i in range(positive(config, "num_hidden_layers")):
        blk, layer = f"blk.{i}", f"{names.layers}.{i}"
        yield TensorSpec(
            f"{blk}.attn_norm.weight", f"{layer}.{names.attention_norm}.weight", (hidden,)
        )
        for part, module, name, rows, columns, permuted in (
            ("q", names.q, "attn_q", q, hidden, rotary),
            ("k", names.k, "attn_k", kv, hidden, rotary),
            ("v", names.v, "attn_v", kv, hidden, 0),
            ("o", names.o, "attn_output", hidden, q, 0),
        ):
            source = f"{layer}.{module}"
            yield TensorSpec(f"{blk}.{name}.weight", f"{source}.weight", (rows, columns), permuted)
            if part in biased:
                yield TensorSpec(f"{blk}.{name}.bias", f"{source}.bias", (rows,), permuted)
        if family.qk_norm:
            for part, source in ("q", names.q_norm), ("k", names.k_norm):
                yield TensorSpec(
                    f"{blk}.attn_{part}_norm.weight", f"{layer}.{source}.weight", (head_dim,)
                )
        yield TensorSpec(f"{blk}.ffn_norm.weight", f"{layer}.{names.ffn_norm}.weight", (hidden,))
        yield TensorSpec(f"{blk}.ffn_gate.weight", f"{layer}.{names.gate}.weight", (inner, hidden))
        yield TensorSpec(f"{blk}.ffn_up.weight", f"{layer}.{names.up}.weight", (inner, hidden))
        yield TensorSpec(f"{blk}.ffn_down.weight", f"{layer}.{names.down}.weight", (hidden, inner))
    yield TensorSpec("output_norm.weight", f"{names.norm}.weight", (hidden,))
    if not tied:
        yield TensorSpec("output.weight", f"{names.head}.weight", (vocab, hidden))


def interleave_rotary(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of each head from the order 0, 1, 2, ... to 0, d/2, 1, d/2 + 1, ...: pairs adjoin."""
    split = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def split_rotary(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """The way back."""
    split = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def rope_freqs(config: Config) -> NDArray[np.float32] | None:
    """What to divide each of RoPE's head_dim/2 frequencies by; None where the config has no scaling
    that differs from one to the other."""
    config = hf_config(config)
    return rope_divisors(read_rope(config), _head_dim(config))


def sliding_window(config: Config) -> int | None:
    """The window, where transformers would really apply one to some layer."""
    architecture = family_of(config).architecture
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", 4096)
    elif architecture == "mistral3":
        window = config.get("sliding_window")
    elif architecture in ("qwen2", "qwen3", "dream") and config.get("use_sliding_window"):
        window = config.get("sliding_window", 4096)
        full_layers = config.get("max_window_layers", 28)
        if not config.get("layer_types") and full_layers >= config["num_hidden_layers"]:
            window = None
    else:
        return None
    if config.get("layer_types") and "sliding_attention" not in config["layer_types"]:
        return None
    return None if window is None else positive({"sliding_window": window}, "sliding_window")


def _head_dim(config: Config) -> int:
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    head_dim = config.get("head_dim") or family_of(config).head_dim
    if head_dim is None:
        if hidden % heads:
            raise ConvertError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        head_dim = hidden // heads
    head_dim = positive({"head_dim": head_dim}, "head_dim")
    if head_dim % 2:
        raise ConvertError(f"config.json: head_dim: expected an even number, got {head_dim}")
    return head_dim


def _kv_heads(config: Config) -> int:
    heads = positive(config, "num_attention_heads")
    key = "num_key_value_heads"
    kv_heads = heads if config.get(key) is None else positive(config, key)
    if heads % kv_heads:
        raise ConvertError(
            f"config.json: num_attention_heads {heads} is not a multiple of {key} {kv_heads}"
        )
    return kv_heads
