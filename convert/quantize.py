"""Float32 rows as bytes of a type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as WeightType
from gguf.quants import quantize
from numpy.typing import NDArray

from .errors import ConvertError
from .searched import ENCODERS, search

CHUNK = 1 << 20  # elements in hand at a time: 4 MiB of float32, a few times over while encoding
_F16 = 65504.0
# The largest magnitude of a type: a block's scale is F16, the largest weight so many of it.
LIMITS = {
    WeightType.F32: 3.4028235e38,
    WeightType.F16: _F16,
    WeightType.BF16: 3.3895314e38,
    WeightType.Q8_0: _F16 * 127,
    WeightType.Q6_K: _F16 * 127 * 31,
    WeightType.Q5_K: _F16 * 63,  # the minimum's
    WeightType.Q4_K: _F16 * 63,
    WeightType.Q5_1: _F16,
    WeightType.Q5_0: _F16 * 15,
    WeightType.Q4_0: _F16 * 8,
}


def stored_bytes(shape: tuple[int, ...], dtype: WeightType) -> int:
    elements, size = GGML_QUANT_SIZES[dtype]
    return int(np.prod(shape)) // elements * size


def row_ranges(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of about CHUNK elements, each a whole number of `multiple` rows."""
    columns = int(np.prod(shape[1:]))
    step = multiple * max(1, CHUNK // (columns * multiple))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def encode(
    rows: NDArray[np.float32],
    dtype: WeightType,
    name: str,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.generic]:
    """`rows` as `dtype` stores them. Values not finite, or too large for it, are an error.

    importance: how much an error in each column counts, to the types that search.
    """
    peak = max(-rows.min(), rows.max())
    if not np.isfinite(peak):
        raise ConvertError(f"tensor {name} holds NaN or infinity")
    if peak > LIMITS[dtype]:
        raise ConvertError(
            f"tensor {name}: {peak:g} does not fit {dtype.name}, which ends at {LIMITS[dtype]:g}; "
            "convert with --type bf16 or f32"
        )
    with np.errstate(all="ignore"):  # a subnormal scale overflows its inverse, and is 0 as F16
        return search(rows, dtype, importance) if dtype in ENCODERS else quantize(rows, dtype)
