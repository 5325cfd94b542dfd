"""Writes a GGUF v3 file whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from .errors import ConvertError
from .quantize import stored_bytes
from .values import Value

ALIGNMENT = 64


@dataclass(frozen=True)
class OutputTensor:
    name: str
    shape: tuple[int, ...]
    dtype: WeightType
    chunks: Callable[[], Iterator[NDArray[np.generic]]]  # its bytes in order, a few rows at a time

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.shape, self.dtype)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: list[OutputTensor],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the model file `path`; `on_bytes` hears of every piece written."""
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ConvertError(f"{path}: the disk has {free:,} bytes free, the file needs {needed:,}")
    with _replacing(path) as temporary:
        writer = GGUFWriter(temporary, str(metadata["general.architecture"]))
        writer.add_custom_alignment(ALIGNMENT)
        for key, value in metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value, _value_type(value))
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
            for tensor in tensors:
                for chunk in tensor.chunks():
                    file.write(chunk.data)
                    on_bytes(chunk.nbytes)
                writer.write_padding(file, tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
        finally:
            writer.close()


def _value_type(value: Value) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place, with usual rights, if the body ends well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk as well
    finally:
        os.close(folder)
