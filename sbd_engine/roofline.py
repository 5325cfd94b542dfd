"""The least time that a forward can take on a machine: it has to read every weight and every key
and value once, and to do every multiplication."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ._core import Engine

# What a weight's type multiplies with: the integers of quantised groups, else itself.
_OPERANDS = {"f32": "f32_gflop_s", "f16": "f16_gflop_s", "bf16": "bf16_gflop_s"}

_KV_BYTES = {"f32": 64, "bf16": 32, "f16": 32, "q8_0": 17}  # of 16 values in a cache


class Work(NamedTuple):
    """Of one model."""

    weight_bytes: int  # that a forward reads
    operations: Counter[str]  # of a row's matmuls, by the peak that bounds them
    kv_bytes: int  # of one position
    attention: int  # operations of one row and key
    kv_dtype: str


def work(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    config: Mapping[str, Any],
    kv_dtype: str = "f16",
) -> Work:
    """tensors: names, types, shapes and bytes, as `_core.read_gguf` lists them. Of an embedding
    that is not the head as well, a row reads next to nothing."""
    tensors = list(tensors)
    untied = any(name == "output.weight" for name, *_ in tensors)
    weight_bytes = 0
    operations: Counter[str] = Counter()
    for name, dtype, shape, size in tensors:
        if untied and name == "token_embd.weight":
            continue
        weight_bytes += size
        if len(shape) == 2:
            operations[_OPERANDS.get(dtype, "int8_gop_s")] += 2 * math.prod(shape)
    layers, dim = config["num_hidden_layers"], config["head_dim"]
    return Work(
        weight_bytes,
        operations,
        kv_bytes=2 * layers * config["num_key_value_heads"] * dim * _KV_BYTES[kv_dtype] // 16,
        attention=2 * 2 * layers * config["num_attention_heads"] * dim,
        kv_dtype=kv_dtype,
    )


def bytes_read(work: Work, context: int, sequences: int = 1) -> int:
    """By a forward: the weights, and the cache of every sequence."""
    return work.weight_bytes + sequences * context * work.kv_bytes


def floor_ms(
    work: Work, rows: int, context: int, machine: Mapping[str, float], sequences: int = 1
) -> float:
    """The larger of reading and multiplying, for `rows` rows of each of the sequences. An F16 cache
    may be multiplied in bf16."""
    f32, bf16 = machine["f32_gflop_s"], machine["bf16_gflop_s"]
    read = bytes_read(work, context, sequences) / machine["read_gb_s"]
    matmul = sum(rows * n / machine[peak] for peak, n in work.operations.items())
    products = max(f32, bf16) if work.kv_dtype in ("f16", "bf16") else f32
    attention = rows * (context + rows) * work.attention / products
    return float(max(read, sequences * (matmul + attention))) / 1e6


def measure(core: Engine) -> dict[str, float]:
    """This machine's peaks, now, in 10^9 bytes and operations per second."""
    peaks = core.measure_peaks()
    return {
        "read_gb_s": peaks["read"] / 1e9,
        "int8_gop_s": peaks["int8"] / 1e9,
        "bf16_gflop_s": peaks["bf16"] / 1e9,
        "f16_gflop_s": peaks["f16"] / 1e9,
        "f32_gflop_s": peaks["f32"] / 1e9,
    }


def implied_speedup(ms: dict[int, float], block_size: int, nfe_reduction: float) -> float:
    """Of Set Block Decoding over one token per forward (arXiv 2509.04185): in `forwards` forwards
    per block, the first runs the last block's commit as well."""
    forwards = block_size / nfe_reduction
    return block_size * ms[1] / (ms[2 * block_size] + (forwards - 1) * ms[block_size])
