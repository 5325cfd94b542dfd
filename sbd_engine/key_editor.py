"""The `sbd.*` keys of a model file, changed where it stands: its tensors are copied as they are."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _core
from .convert.settings import OLDER_KEYS
from .errors import SbdError, SbdFileError, SbdFileNotFoundError, SbdValueError
from .replacing import replacing

if TYPE_CHECKING:
    from .convert.values import Value

# GGUF's types of a value, by their numbers.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_HEADER = "<4sIQQ"  # magic, version, tensors, keys
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM}
_PIECE = 64 << 20  # copied at once: Ctrl-C waits no longer

# GGUF's own names of what ours say, which others read, and what they hold.
_TWINS = {
    "sbd.mask_token_id": "tokenizer.ggml.mask_token_id",
    "sbd.logit_shift": "diffusion.shift_logits",
}


def edit_keys(path: Path, values: Mapping[str, Value], unset: Collection[str]) -> dict[str, Any]:
    """Sets and removes keys; returns the file's `sbd.*` keys as they were. The file is replaced by
    one that the engine's reader takes, or left as it was: SbdValueError, SbdFileError."""
    contents = _read(path)
    before = contents["metadata"]
    older = {today: name for today, name in OLDER_KEYS.items() if name in before}
    for key in unset:
        if key not in before and key not in older:
            raise SbdValueError(f"{path}: --unset {key}: the file has no such key")
    changes: dict[str, Value | None] = {**values, **dict.fromkeys(unset)}
    changes |= _twins(changes, before)
    changes |= {name: None for today, name in older.items() if today in changes}
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        data = file.read(contents["data_begin"])
        try:
            layout = _layout(data, before.get("general.alignment", 32))
        except (struct.error, LookupError):  # it was sound a moment ago
            raise SbdFileError(f"{path}: another process changed it meanwhile: run again") from None
        header = _edited(data, layout, changes)
        if header != data[: layout.data]:
            with replacing(path, like=stat) as temporary:
                _write(temporary, header, file.fileno(), layout.data, stat.st_size)
                _check(temporary, path, contents)
                now = os.stat(path)
                if (now.st_ino, now.st_mtime_ns) != (stat.st_ino, stat.st_mtime_ns):
                    raise SbdFileError(f"{path}: another process changed it meanwhile: run again")
    today = {name: key for key, name in OLDER_KEYS.items()}
    return {today.get(key, key): v for key, v in before.items() if key.startswith("sbd.")}


def _read(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        raise SbdFileError(
            f"{path}: expected the model file itself, got a symbolic link to {os.readlink(path)}"
        )
    if not path.exists():
        raise SbdFileNotFoundError(f"{path}: no such file")
    if not S_ISREG(path.stat().st_mode):
        raise SbdFileError(f"{path}: expected a model file, got a folder, pipe or device")
    return _core.read_gguf(path)


def _twins(changes: Mapping[str, Value | None], before: Mapping[str, Any]) -> dict[str, Any]:
    """What changes with the keys: others read the mask token and the shift by GGUF's names."""
    twins: dict[str, Any] = {}
    for key, twin in _TWINS.items():
        if key in changes and (twin in before or key == "sbd.mask_token_id"):
            value = changes[key]
            twins[twin] = bool(value) if twin == "diffusion.shift_logits" else value
    return twins


class _Layout(NamedTuple):
    """Where a file's parts lie; the reader has checked all counts and lengths."""

    keys: list[tuple[str, int, int]]  # name, begin, end
    tensors_begin: int  # of their descriptions
    tensors_end: int
    data: int
    alignment: int


def _layout(data: bytes, alignment: int) -> _Layout:
    _, _, n_tensors, n_keys = struct.unpack_from(_HEADER, data)
    at = struct.calcsize(_HEADER)
    keys = []
    for _ in range(n_keys):
        begin = at
        (length,) = struct.unpack_from("<Q", data, at)
        name = data[at + 8 : at + 8 + length].decode(errors="replace")
        (kind,) = struct.unpack_from("<I", data, at + 8 + length)
        at = _value_end(data, kind, at + 12 + length)
        keys.append((name, begin, at))
    tensors_begin = at
    for _ in range(n_tensors):
        (length,) = struct.unpack_from("<Q", data, at)
        (rank,) = struct.unpack_from("<I", data, at + 8 + length)
        at += 8 + length + 4 + 8 * rank + 4 + 8
    return _Layout(keys, tensors_begin, at, _aligned(at, alignment), alignment)


def _value_end(data: bytes, kind: int, at: int) -> int:
    if kind == _STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != _ARRAY:
        return at + _SIZES[kind]
    count: int
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind != _STRING:
        return at + count * _SIZES[kind]
    for _ in range(count):
        at = _value_end(data, kind, at)
    return at


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _edited(data: bytes, layout: _Layout, changes: Mapping[str, Value | None]) -> bytes:
    """All that stands before the tensors' data: keys keep their places, new ones come last."""
    rest = dict(changes)
    parts = []
    for name, begin, end in layout.keys:
        if name not in changes:
            parts.append(data[begin:end])
        elif (value := rest.pop(name)) is not None:
            parts.append(_encoded(name, value))
    parts += [_encoded(name, value) for name, value in rest.items() if value is not None]
    magic, version, n_tensors, _ = struct.unpack_from(_HEADER, data)
    header = struct.pack(_HEADER, magic, version, n_tensors, len(parts)) + b"".join(parts)
    header += data[layout.tensors_begin : layout.tensors_end]
    return header.ljust(_aligned(len(header), layout.alignment), b"\0")


def _encoded(key: str, value: Value) -> bytes:
    """As the converter writes it."""
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + b"".join(_typed(value))


def _typed(value: Value) -> Iterator[bytes]:
    if isinstance(value, bool):
        yield struct.pack("<I?", _BOOL, value)
    elif isinstance(value, int):
        yield struct.pack("<II", _U32, value)
    elif isinstance(value, float):
        yield struct.pack("<If", _F32, value)
    elif isinstance(value, str):
        yield struct.pack("<I", _STRING)
        yield _string(value)
    else:
        kind = _STRING if isinstance(value[0], str) else _I32
        yield struct.pack("<IIQ", _ARRAY, kind, len(value))
        for each in value:
            yield _string(each) if isinstance(each, str) else struct.pack("<i", each)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _write(path: Path, header: bytes, source: int, begin: int, end: int) -> None:
    with path.open("r+b", buffering=0) as file:
        if len(header) == begin:  # all stays where it is: some file systems only share it then
            begin = 0
        else:
            file.seek(len(header))
        _copy(source, file.fileno(), begin, end)
        file.seek(0)
        rest = header
        while rest:
            rest = rest[file.write(rest) :]


def _copy(source: int, target: int, begin: int, end: int) -> None:
    """In the kernel, where it can; to where `target` stands."""
    in_kernel = True
    while begin < end:
        size = min(_PIECE, end - begin)
        try:
            copied = (
                os.copy_file_range(source, target, size, begin)
                if in_kernel
                else os.write(target, os.pread(source, size, begin))
            )
        except OSError as error:
            if not in_kernel or error.errno not in _NO_KERNEL_COPY:
                raise
            in_kernel = False
            continue
        if copied == 0:
            raise SbdFileError("the model file was cut short meanwhile: run again")
        begin += copied


def _check(temporary: Path, path: Path, before: Mapping[str, Any]) -> None:
    """That the engine runs what was written, and that the tensors are those before."""
    try:
        after = _core.read_gguf(temporary)
        problem = after["problem"]
    except SbdError as error:
        problem = str(error)
    if problem is not None:  # what it advises is for files that were just converted
        found = problem.replace(str(temporary), str(path)).split("; convert ")[0]
        raise SbdValueError(f"{found}; nothing was changed")
    if after["tensors"] != before["tensors"]:
        raise SbdFileError(f"{path}: another process changed it meanwhile: run again")
