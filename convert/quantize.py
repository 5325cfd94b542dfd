"""Which type a weight is stored in, and its float32 rows as bytes of that type."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as WeightType
from gguf.quants import quantize
from numpy.typing import NDArray

from .errors import ConvertError

TYPES = {
    "f32": WeightType.F32,
    "f16": WeightType.F16,
    "bf16": WeightType.BF16,
    "q8_0": WeightType.Q8_0,
    "q4_0": WeightType.Q4_0,
}
# The largest magnitude of a type: a group's scale is F16, the largest weight 127 or 8 of it.
LIMITS = {
    WeightType.F32: 3.4028235e38,
    WeightType.F16: 65504.0,
    WeightType.BF16: 3.3895314e38,
    WeightType.Q8_0: 65504.0 * 127,
    WeightType.Q4_0: 65504.0 * 8,
}


def weight_type(name: str) -> WeightType:
    if name not in TYPES:
        raise ConvertError(f"--type: expected one of {', '.join(TYPES)}, got {name!r}")
    return TYPES[name]


def stored_type(shape: tuple[int, ...], wanted: WeightType) -> WeightType:
    """The type a tensor gets: vectors stay F32, and rows that groups do not fill go to F16."""
    if len(shape) == 1:
        return WeightType.F32
    return WeightType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def stored_bytes(shape: tuple[int, ...], dtype: WeightType) -> int:
    elements, size = GGML_QUANT_SIZES[dtype]
    return int(np.prod(shape)) // elements * size


def encode(rows: NDArray[np.float32], dtype: WeightType, name: str) -> NDArray[np.generic]:
    """`rows` as `dtype` stores them. Values not finite, or too large for it, are an error."""
    peak = max(-rows.min(), rows.max())
    if not np.isfinite(peak):
        raise ConvertError(f"tensor {name} holds NaN or infinity")
    if peak > LIMITS[dtype]:
        raise ConvertError(
            f"tensor {name}: {peak:g} does not fit {dtype.name}, which ends at {LIMITS[dtype]:g}; "
            "convert with --type bf16 or f32"
        )
    with np.errstate(all="ignore"):  # a subnormal scale overflows its inverse, and is 0 as F16
        return quantize(rows, dtype)
