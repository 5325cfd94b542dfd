"""The least time that a forward can take on a machine: it has to read every weight and every key
and value once, and to do every multiplication."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sbd_engine import _core

_INTEGER = ("q8_0", "q6_k", "q4_k", "q4_0")  # multiplied as int8, the others as BF16


class Work(NamedTuple):
    """Of one model file."""

    weight_bytes: int
    weights: int  # elements of matrices, each multiplied once per row
    kv_bytes: int  # of one position, in F16
    attention: int  # operations of one row and key


def work(path: Path) -> Work:
    file = _core.read_gguf(path)
    config = file["model_config"]
    tensors = [(shape, size) for _, _, shape, size in file["tensors"]]
    layers, dim = config["num_hidden_layers"], config["head_dim"]
    return Work(
        weight_bytes=sum(size for _, size in tensors),
        weights=sum(shape[0] * shape[1] for shape, _ in tensors if len(shape) == 2),
        kv_bytes=layers * config["num_key_value_heads"] * dim * 2 * 2,
        attention=layers * config["num_attention_heads"] * dim * 2 * 2,
    )


def floor_ms(work: Work, dtype: str, rows: int, context: int, machine: dict[str, float]) -> float:
    """For a tied embedding, which is the head as well."""
    read = work.weight_bytes + context * work.kv_bytes
    peak = machine["int8_gop_s"] if dtype in _INTEGER else machine["bf16_gflop_s"]
    matmul = 2 * rows * work.weights / peak
    attention = rows * (context + rows) * work.attention / machine["f32_gflop_s"]
    return max(read / machine["read_gb_s"], matmul + attention) / 1e6


def medians(samples: list[dict[str, float]]) -> dict[str, Any]:
    return {key: median(sample[key] for sample in samples) for key in samples[0]}
