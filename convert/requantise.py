"""A GGUF file in other types, without its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFValueType
from gguf import GGMLQuantizationType as WeightType
from gguf.quants import dequantize
from numpy.typing import NDArray

from .errors import ConvertError, listed
from .importance import load_importance
from .mixes import mix_of, types_of
from .quantize import encode, row_ranges, stored_bytes
from .values import Typed, Value
from .writer import OutputFile, OutputTensor, check_output, write_files

# What rounds so little that rounding again loses next to nothing more.
NEARLY_EXACT = (WeightType.F32, WeightType.F16, WeightType.BF16, WeightType.Q8_0)
COPIED = 1 << 24  # bytes at a time of a tensor that stays as it is


@dataclass(frozen=True)
class Requantised:
    """What was written, for the user to read."""

    output: Path
    n_bytes: int
    n_changed: int
    n_tensors: int
    type: str


@dataclass(frozen=True)
class _Stored:
    """A tensor of the source; read, not mapped, so that pages do not pile up in memory."""

    path: Path
    name: str
    dtype: WeightType
    shape: tuple[int, ...]
    offset: int

    def bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        data = np.fromfile(self.path, np.uint8, stop - start, offset=self.offset + start)
        if len(data) < stop - start:
            raise ConvertError(f"{self.path}: the file was cut short while it was read: run again")
        return data

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        row = stored_bytes(self.shape[-1:], self.dtype)
        data = self.bytes(start * row, stop * row).reshape(stop - start, row)
        if self.dtype == WeightType.F16:
            return data.view(np.float16).astype(np.float32)
        values: NDArray[np.float32] = dequantize(
            data.view(np.float32) if self.dtype == WeightType.F32 else data, self.dtype
        )
        return values


def requantise(
    source: Path,
    output: Path,
    *,
    type: str,
    importance: Path | None = None,
    allow_requantise: bool = False,
    warn: Callable[[str], None],
    on_start: Callable[[int], None] = lambda _: None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Requantised:
    """Writes the model file `source` with its weights in the types that `type` gives them; the
    engine's reader has taken the file. Tensors that have theirs already are copied, and so are all
    keys. Raises ConvertError, or OSError; then `output` is as it was."""
    mix = mix_of(type)
    check_output(output, [source], "the model file to read")
    reader = GGUFReader(source)
    stored = [_stored(source, tensor) for tensor in reader.tensors]
    _check_kind(source, reader)
    notes: list[str] = []
    shapes = {tensor.name: tensor.shape for tensor in stored}
    types = types_of(shapes, mix, notes.append)
    # Vectors stay as they are.
    changed = [t for t in stored if len(t.shape) > 1 and t.dtype != types[t.name]]
    twice = [t for t in changed if t.dtype not in NEARLY_EXACT and types[t.name] != WeightType.F32]
    if twice and not allow_requantise:
        kinds = sorted({tensor.dtype.name for tensor in twice})
        raise ConvertError(
            f"{source}: {len(twice)} tensors are {', '.join(kinds)} already, and would lose again: "
            f"{listed([tensor.name for tensor in twice])}; start from the checkpoint or a file in "
            "F16 or Q8_0, or give --allow-requantise"
        )
    counts = load_importance(importance, shapes, mix, type)
    for note in notes:
        warn(note)
    metadata = dict(_kept_keys(reader, warn))
    metadata["general.file_type"] = int(mix.file_type)
    metadata["general.quantization_version"] = GGML_QUANT_VERSION
    metadata |= counts.keys
    names = {tensor.name for tensor in changed}
    tensors = [
        _changed(tensor, types[tensor.name], counts.columns.get(tensor.name))
        if tensor.name in names
        else _copied(tensor)
        for tensor in stored
    ]
    file = OutputFile(output, metadata, tensors)
    on_start(file.nbytes)
    write_files([file], on_bytes)
    return Requantised(output, output.stat().st_size, len(changed), len(stored), type)


def _check_kind(source: Path, reader: GGUFReader) -> None:
    def contents(key: str, usual: Any) -> Any:
        return reader.fields[key].contents() if key in reader.fields else usual

    kind = contents("general.type", "model")
    if kind != "model":
        raise ConvertError(f"{source}: expected a model's file, got one of type {kind!r:.60}")
    if contents("split.count", 1) != 1:
        raise ConvertError(f"{source}: one of {contents('split.count', 1)} parts: join them first")


def _stored(path: Path, tensor: Any) -> _Stored:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _Stored(path, tensor.name, tensor.tensor_type, shape, int(tensor.data_offset))


def _kept_keys(
    reader: GGUFReader, warn: Callable[[str], None]
) -> Iterator[tuple[str, Value | Typed]]:
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.alignment":  # its own here
            continue
        kind, *inner = field.types
        if kind == GGUFValueType.ARRAY and inner[:1] in ([], [GGUFValueType.ARRAY]):
            warn(f"{key} is left out: an array without values, or of arrays")
            continue
        yield key, Typed(field.contents(), kind, inner[0] if inner else None)


def _changed(
    tensor: _Stored, dtype: WeightType, columns: NDArray[np.float32] | None
) -> OutputTensor:
    def piece(start: int, stop: int) -> NDArray[np.generic]:
        return encode(tensor.rows(start, stop), dtype, tensor.name, columns)

    n_rows = int(np.prod(tensor.shape[:-1]))
    ranges = row_ranges((n_rows, tensor.shape[-1]))
    pieces = [partial(piece, start, stop) for start, stop in ranges]
    return OutputTensor(tensor.name, tensor.shape, dtype, pieces)


def _copied(tensor: _Stored) -> OutputTensor:
    size = stored_bytes(tensor.shape, tensor.dtype)
    starts = range(0, size, COPIED)
    pieces = [partial(tensor.bytes, start, min(start + COPIED, size)) for start in starts]
    return OutputTensor(tensor.name, tensor.shape, tensor.dtype, pieces)
