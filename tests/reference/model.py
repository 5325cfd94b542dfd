"""A float64 numpy forward of the Llama, Mistral, Qwen2 and Qwen3 architectures, without a cache.

Weights are a dict of HF tensor names, the config is the dict of an HF `config.json`. Attention is
one integer per row: row i sees the keys [0, kv_end[i]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# model_type -> (biases on q, k and v; RMSNorm on each query and key head before RoPE)
ARCHITECTURES = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


def causal(n: int) -> NDArray[np.int64]:
    """kv_end of n causal rows: row i sees [0, i + 1)."""
    return np.arange(1, n + 1)


def with_block(n: int, b: int) -> NDArray[np.int64]:
    """kv_end of n rows whose last b form one block: those see everything, the rest is causal."""
    if not 0 <= b <= n:
        raise ValueError(f"expected a block of 0 to {n} rows, got {b}")
    kv_end = causal(n)
    kv_end[n - b :] = n
    return kv_end


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> Array:
    """Angle per position of each rotated pair [head_dim / 2], in radians."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    frequencies: Array = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    divided: Array = frequencies / scaling["factor"]
    if kind == "linear":
        return divided
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        # s = 0 from `low` turns down: f / factor. s = 1 from `high` turns up: f as it is.
        s: Array = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - s) * divided + s * frequencies
    if kind == "yarn":
        length = scaling["original_max_position_embeddings"]

        def pair_of(turns: float) -> float:
            """The pair, as a fraction, that turns that often over the original length."""
            return float(head_dim * np.log(length / (2 * np.pi * turns)) / (2 * np.log(theta)))

        low = max(np.floor(pair_of(scaling.get("beta_fast", 32))), 0)
        high = min(np.ceil(pair_of(scaling.get("beta_slow", 1))), head_dim - 1)
        pairs = np.arange(head_dim // 2)
        s = 1 - np.clip((pairs - low) / max(high - low, 0.001), 0.0, 1.0)
        return (1 - s) * divided + s * frequencies
    raise ValueError(f"expected RoPE type default, linear, llama3 or yarn, got {kind!r}")


def rope_factor(config: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosines and sines with: 1 where mscale and mscale_all_dim are equal."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 1.0

    def factor(mscale: float) -> float:
        return float(0.1 * mscale * np.log(scaling["factor"]) + 1)

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return factor(scaling["mscale"]) / factor(scaling["mscale_all_dim"])
    return factor(1.0)


@dataclass(frozen=True)
class Layer:
    """One layer's weights, transposed to [in, out] so that rows multiply from the left."""

    attention_norm: Array  # [hidden]
    q: Array  # [hidden, heads * head_dim]
    k: Array  # [hidden, kv_heads * head_dim]
    v: Array  # [hidden, kv_heads * head_dim]
    o: Array  # [heads * head_dim, hidden]
    q_bias: Array | float
    k_bias: Array | float
    v_bias: Array | float
    q_norm: Array | None  # [head_dim]
    k_norm: Array | None  # [head_dim]
    mlp_norm: Array  # [hidden]
    gate: Array  # [hidden, intermediate]
    up: Array  # [hidden, intermediate]
    down: Array  # [intermediate, hidden]


@dataclass(frozen=True)
class Adapter:
    """What it adds to each layer's matrices, [in, out] by their names in `Layer`, and what the id
    `mask_id` is embedded as."""

    deltas: Sequence[Mapping[str, Array]]
    mask: Array | None = None
    mask_id: int | None = None


class ReferenceModel:
    """The forward. Every tensor is used: a missing or a left-over one is a ValueError."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        if config["model_type"] not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise ValueError(f"expected model_type in {names}, got {config['model_type']!r}")
        bias, qk_norm = ARCHITECTURES[config["model_type"]]
        self.vocab_size: int = config["vocab_size"]
        self.hidden_size: int = config["hidden_size"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or self.hidden_size // self.heads
        self.eps: float = config["rms_norm_eps"]
        self.frequencies = rope_frequencies(config, self.head_dim)
        self.rope_factor = rope_factor(config)
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.query_scale_beta: float = scaling.get("llama_4_scaling_beta") or 0.0
        self.query_scale_length: int = scaling.get("original_max_position_embeddings", 1)

        hidden, inner = self.hidden_size, config["intermediate_size"]
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        unused = dict(tensors)

        def take(name: str, *shape: int) -> Array:
            if name not in unused:
                raise ValueError(f"tensor {name} is missing")
            tensor = np.asarray(unused.pop(name), dtype=np.float64)
            if tensor.shape != shape:
                raise ValueError(f"tensor {name}: expected shape {shape}, got {tensor.shape}")
            return np.ascontiguousarray(tensor.T)

        def layer(prefix: str) -> Layer:
            def bias_of(part: str, rows: int) -> Array | float:
                return take(f"{prefix}self_attn.{part}_proj.bias", rows) if bias else 0.0

            def norm_of(part: str) -> Array | None:
                name = f"{prefix}self_attn.{part}_norm.weight"
                return take(name, self.head_dim) if qk_norm else None

            return Layer(
                attention_norm=take(f"{prefix}input_layernorm.weight", hidden),
                q=take(f"{prefix}self_attn.q_proj.weight", q_rows, hidden),
                k=take(f"{prefix}self_attn.k_proj.weight", kv_rows, hidden),
                v=take(f"{prefix}self_attn.v_proj.weight", kv_rows, hidden),
                o=take(f"{prefix}self_attn.o_proj.weight", hidden, q_rows),
                q_bias=bias_of("q", q_rows),
                k_bias=bias_of("k", kv_rows),
                v_bias=bias_of("v", kv_rows),
                q_norm=norm_of("q"),
                k_norm=norm_of("k"),
                mlp_norm=take(f"{prefix}post_attention_layernorm.weight", hidden),
                gate=take(f"{prefix}mlp.gate_proj.weight", inner, hidden),
                up=take(f"{prefix}mlp.up_proj.weight", inner, hidden),
                down=take(f"{prefix}mlp.down_proj.weight", hidden, inner),
            )

        embedding = take("model.embed_tokens.weight", self.vocab_size, hidden)  # [hidden, vocab]
        self.embedding = np.ascontiguousarray(embedding.T)
        self.layers = [layer(f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]
        self.norm = take("model.norm.weight", hidden)
        tied = config.get("tie_word_embeddings", False)
        self.head = embedding if tied else take("lm_head.weight", self.vocab_size, hidden)
        if unused:
            raise ValueError(f"tensors without a use: {', '.join(sorted(unused))}")

    def forward(
        self,
        ids: Sequence[int],
        kv_end: NDArray[np.int64],
        last: int | None = None,
        adapter: Adapter | None = None,
        adapted: int = 0,
    ) -> Array:
        """Logits [n, vocab] of the n `ids` at positions 0..n-1; row i sees keys [0, kv_end[i]).

        `last` returns those of the last `last` rows alone, [last, vocab]; all n rows are still
        computed as far as the others need them. The last `adapted` rows have the adapter, behind
        keys and values that know nothing of it.
        """
        n = len(ids)
        last = n if last is None else last
        if kv_end.shape != (n,) or kv_end.min() < 1 or kv_end.max() > n:
            raise ValueError(f"expected {n} values of kv_end in [1, {n}], got {kv_end}")
        if not 1 <= last <= n or adapted > last:
            raise ValueError(f"expected {adapted} to {n} rows of logits, got {last}")
        x = self.embedding[np.asarray(ids)]
        if adapter is not None and adapter.mask is not None:
            for row in range(n - adapted, n):
                if ids[row] == adapter.mask_id:
                    x[row] = adapter.mask
        return self._logits(self._run(x, self.layers, kv_end, last, adapter, adapted))

    def forward_split(
        self, ids: Sequence[int], split: Sequence[int], a: Array, b: Array, last: int | None = None
    ) -> Array:
        """Causal logits of the layers in three runs E, T, D of `split` layers (arXiv 2510.11958).

        e = E(embedding), h = T(e), z = a e + b h with a and b [n] per row, logits of D(z).
        """
        encoding, thinking, decoding = split
        if encoding + thinking + decoding != len(self.layers) or min(split) < 0:
            raise ValueError(f"expected three runs of {len(self.layers)} layers, got {split}")
        n = len(ids)
        kv_end = causal(n)
        e = self._run(self.embedding[np.asarray(ids)], self.layers[:encoding], kv_end, n)
        h = self._run(e, self.layers[encoding : encoding + thinking], kv_end, n)
        z = a[:, None] * e + b[:, None] * h
        return self._logits(self._run(z, self.layers[encoding + thinking :], kv_end, last or n))

    def _run(
        self,
        x: Array,
        layers: Sequence[Layer],
        kv_end: NDArray[np.int64],
        last: int,
        adapter: Adapter | None = None,
        adapted: int = 0,
    ) -> Array:
        """x [n, hidden] through `layers`: the last `last` rows of the result."""
        n = len(x)

        def times(rows: Array, index: int, matrix: str) -> Array:
            """Rows, the last of which are x's last ones, through a layer's matrix."""
            out: Array = rows @ getattr(layers[index], matrix)
            if adapter is not None and adapted and matrix in adapter.deltas[index]:
                out[-adapted:] += rows[-adapted:] @ adapter.deltas[index][matrix]
            return out

        angles = np.arange(n)[:, None] * self.frequencies
        cos, sin = self.rope_factor * np.cos(angles), self.rope_factor * np.sin(angles)
        scale = self._query_scale(np.arange(n))
        mask = np.where(np.arange(n) < kv_end[:, None], 0.0, -np.inf)  # [n, n]
        for i, layer in enumerate(layers):
            # The last layer's other rows are not wanted, only their keys and values.
            first = n - last if i == len(layers) - 1 else 0
            a = self._rms_norm(x, layer.attention_norm)
            q = self._heads(times(a[first:], i, "q") + layer.q_bias, layer.q_norm)
            k = self._heads(times(a, i, "k") + layer.k_bias, layer.k_norm)
            v = self._heads(times(a, i, "v") + layer.v_bias, None)
            q, k = rotate(q, cos[first:], sin[first:]), rotate(k, cos, sin)
            q *= scale[first:]
            x = x[first:] + times(self._attention(q, k, v, mask[first:]), i, "o")
            a = self._rms_norm(x, layer.mlp_norm)
            gate = times(a, i, "gate")
            x = x + times(gate / (1 + np.exp(-gate)) * times(a, i, "up"), i, "down")
        return x[len(x) - last :]

    def _logits(self, x: Array) -> Array:
        logits: Array = self._rms_norm(x, self.norm) @ self.head
        return logits

    def _query_scale(self, positions: NDArray[np.int64]) -> Array:
        """1 + beta ln(1 + floor(position / original length)) [rows, 1], on queries after RoPE."""
        steps = np.floor(positions / self.query_scale_length)
        scale: Array = 1 + self.query_scale_beta * np.log1p(steps)
        return scale[:, None]

    def _rms_norm(self, x: Array, weight: Array) -> Array:
        squares = np.einsum("...i,...i->...", x, x)[..., None]
        root: Array = np.sqrt(squares / x.shape[-1] + self.eps)
        return x / root * weight

    def _heads(self, x: Array, norm: Array | None) -> Array:
        """[rows, heads * head_dim] -> [heads, rows, head_dim], normalised where `norm` is given."""
        x = x.reshape(len(x), -1, self.head_dim).transpose(1, 0, 2)
        return x if norm is None else self._rms_norm(x, norm)

    def _attention(self, q: Array, k: Array, v: Array, mask: Array) -> Array:
        """q [heads, rows, head_dim], k and v [kv_heads, n, head_dim] -> [rows, heads * head_dim].

        Query head h reads key head h // (heads / kv_heads).
        """
        rows = len(mask)
        q = q.reshape(self.kv_heads, -1, rows, self.head_dim)
        scores = q @ k[:, None].swapaxes(-1, -2)  # [kv_heads, group, rows, n]
        scores *= self.head_dim**-0.5
        scores += mask
        scores -= scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        out = (weights @ v[:, None]) / weights.sum(axis=-1, keepdims=True)
        by_row: Array = out.reshape(self.heads, rows, self.head_dim).transpose(1, 0, 2)
        return by_row.reshape(rows, self.heads * self.head_dim)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE on [heads, rows, head_dim]: dimension j turns with dimension j + head_dim / 2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
