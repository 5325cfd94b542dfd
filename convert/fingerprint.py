"""Which model an adapter was trained beside, as far as the weights tell that quantising keeps.

Eight hexadecimal digits: the CRC-32 of a line for each matrix and, in float32, each norm of the
model file. The engine computes the same of the file that it is given (engine/model/fingerprint.cpp).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

FINGERPRINT_KEY = "sbd.draft.fingerprint"


def is_fingerprinted(name: str) -> bool:
    """Whether a tensor of a model file counts: the LM head does not, which may be the embedding."""
    return name == "token_embd.weight" or name == "output_norm.weight" or name.startswith("blk.")


def fingerprint(
    shapes: Mapping[str, Sequence[int]], norms: Mapping[str, NDArray[np.float32]]
) -> str:
    """Of a model's matrices, [outputs, inputs] by their names in the model file, the embedding
    [vocabulary, hidden] among them, and of its norms' weights. What does not count is passed
    over, so all that a file has may be given."""
    lines: dict[str, bytes] = {}
    for name, shape in shapes.items():
        if is_fingerprinted(name) and len(shape) == 2:
            lines[name] = f"{name} {shape[0]} {shape[1]}\n".encode()
    for name, values in norms.items():
        if is_fingerprinted(name) and name.endswith("norm.weight"):
            floats = np.ascontiguousarray(values, "<f4")
            lines[name] = f"{name} {floats.size}\n".encode() + floats.tobytes()
    crc = 0
    for name in sorted(lines):
        crc = zlib.crc32(lines[name], crc)
    return f"{crc:08x}"
