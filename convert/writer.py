"""Writes GGUF v3 files whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from .errors import ConvertError
from .quantize import stored_bytes
from .replacing import replacing
from .values import Typed, Value

Piece = Callable[[], NDArray[np.generic]]


@dataclass(frozen=True)
class OutputTensor:
    name: str
    shape: tuple[int, ...]
    dtype: WeightType
    pieces: Sequence[Piece]  # its bytes in order, a few rows each; they are made in parallel

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class OutputFile:
    path: Path
    metadata: Mapping[str, Value | Typed]
    tensors: list[OutputTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def check_output(output: Path, sources: Sequence[Path], what: str) -> None:
    """That a file may be written there; what: one of `sources`, for the error."""
    if output.is_dir():
        raise ConvertError(f"{output}: is a folder: expected the model file to write")
    if not output.parent.is_dir():
        raise ConvertError(f"{output.parent}: no such folder")
    if not output.exists():
        return
    if not output.is_file():
        raise ConvertError(f"{output}: is no regular file, which writing would replace")
    if any(output.samefile(path) for path in sources):
        raise ConvertError(f"{output}: is {what}")


def write_files(
    files: Sequence[OutputFile], on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Write all of them, in one folder, or none; `on_bytes` hears of every piece written."""
    needed = sum(file.nbytes for file in files)
    free = shutil.disk_usage(files[0].path.parent).free
    if needed > free:
        raise ConvertError(
            f"{files[0].path}: the disk has {free:,} bytes free, {needed:,} are needed"
        )
    with replacing([file.path for file in files]) as temporaries:
        for temporary, file in zip(temporaries, files, strict=True):
            _write(temporary, file, on_bytes)


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: list[OutputTensor]) -> None:
    """Write one file."""
    write_files([OutputFile(path, metadata, tensors)])


def _write(path: Path, contents: OutputFile, on_bytes: Callable[[int], None]) -> None:
    metadata, tensors = contents.metadata, contents.tensors
    architecture = metadata["general.architecture"]
    name = architecture.value if isinstance(architecture, Typed) else architecture
    writer = GGUFWriter(path, str(name))
    for key, value in metadata.items():
        if key != "general.architecture":
            typed = value if isinstance(value, Typed) else Typed(value, _value_type(value), None)
            writer.add_key_value(key, *typed)
    for tensor in tensors:
        # With raw_dtype given, the numpy type stands for nothing.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.dtype
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        made = _made(piece for tensor in tensors for piece in tensor.pieces)
        for tensor in tensors:
            for _ in tensor.pieces:
                data = next(made)
                file.write(data.data)
                on_bytes(data.nbytes)
            writer.write_padding(file, tensor.nbytes)
    finally:
        writer.close()


def _made(pieces: Iterable[Piece]) -> Iterator[NDArray[np.generic]]:
    """What each gives, in order: a few are in hand at a time, on all processors."""
    threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[NDArray[np.generic]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(piece))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _value_type(value: Value) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)
