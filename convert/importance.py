"""How much each column of a weight counts: a file in llama.cpp's format of importance matrices.

Of a weight NAME it has the sums of squares of what each column was multiplied by, NAME.in_sum2, and
of how many rows, NAME.counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFReader
from gguf.constants import Keys
from numpy.typing import NDArray

from .errors import ConvertError, listed
from .mixes import Mix, stored_type, wanted_types
from .quantize import encode
from .searched import ENCODERS
from .values import Value
from .writer import OutputTensor, write_gguf

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Of each weight that it knows the mean square of what each column is multiplied by."""

    columns: Mapping[str, NDArray[np.float32]]
    keys: Mapping[str, Value]  # that say in a model file what it was made with


def load_importance(
    path: Path | None, shapes: Mapping[str, tuple[int, ...]], mix: Mix, type: str
) -> Importance:
    """That of a model with tensors of these shapes, which `mix` stores; without a file it knows
    none."""
    if path is None:
        return Importance({}, {})
    wanted = wanted_types(shapes, mix)
    searched = [name for name in shapes if stored_type(shapes[name], wanted[name]) in ENCODERS]
    if not searched:
        raise ConvertError(
            f"--importance: would change nothing: no weight of --type {type} is searched for"
        )
    columns, reader = _read(path)
    known = [name for name in searched if name in columns]
    if not known:
        raise ConvertError(
            f"{path}: says nothing of {listed(searched)}: expected the importance of this model"
        )
    for name in known:
        if len(columns[name]) != shapes[name][-1]:
            raise ConvertError(
                f"{path}: {name} has {len(columns[name])} columns there, {shapes[name][-1]} in the "
                "model: expected the importance of this model"
            )
    keys: dict[str, Value] = {"quantize.imatrix.file": path.name}
    if Keys.IMatrix.CHUNK_COUNT in reader.fields:
        chunks = int(reader.fields[Keys.IMatrix.CHUNK_COUNT].contents())
        keys["quantize.imatrix.chunks_count"] = chunks
    keys["quantize.imatrix.entries_count"] = len(columns)
    return Importance({name: columns[name] for name in known}, keys)


def _read(path: Path) -> tuple[dict[str, NDArray[np.float32]], GGUFReader]:
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
        tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        kind = reader.fields["general.type"].contents()
    except Exception as error:  # the library trusts what it reads
        line = f"{type(error).__name__}: {error}"
        raise ConvertError(f"{path}: not a whole GGUF file of an importance: {line}") from None
    if kind != "imatrix":
        raise ConvertError(f"{path}: expected an importance (general.type imatrix), got {kind!r}")
    columns = {}
    for name, tensor in tensors.items():
        if name.endswith(SUMS):
            weight = name.removesuffix(SUMS)
            counts = tensors.get(weight + COUNTS)
            if counts is None or any(t.tensor_type != WeightType.F32 for t in (tensor, counts)):
                raise ConvertError(f"{path}: {weight}: expected float32 {SUMS} and {COUNTS}")
            if counts.n_elements != 1:
                continue  # of experts, which this converter has not
            sums, count = tensor.data.ravel(), float(counts.data.ravel()[0])
            if not (np.isfinite(sums).all() and (sums >= 0).all() and 0 <= count < np.inf):
                raise ConvertError(f"{path}: {weight}: expected sums of squares, got others")
            if count > 0:
                columns[weight] = (sums / count).astype(np.float32)
    return columns, reader


def write_importance(
    path: Path,
    sums: Mapping[str, tuple[int, NDArray[np.float64]]],
    *,
    architecture: str,
    datasets: list[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """sums: of each weight how many rows, and the sums of their squares."""
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "imatrix",
        Keys.IMatrix.DATASETS: datasets,
        Keys.IMatrix.CHUNK_COUNT: chunks,
        Keys.IMatrix.CHUNK_SIZE: chunk_size,
    }
    tensors = []
    for weight, (rows, squares) in sorted(sums.items()):
        for name, values in ((SUMS, squares), (COUNTS, np.array([rows], np.float64))):
            row = values.astype(np.float32)[None]
            piece = partial(encode, row, WeightType.F32, weight + name)
            tensors.append(OutputTensor(weight + name, row.shape, WeightType.F32, [piece]))
    write_gguf(path, metadata, tensors)
