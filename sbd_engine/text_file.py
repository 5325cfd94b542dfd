"""A user's text, from a file or a pipe: UTF-8, and one clear line where it cannot be read. The byte
order mark that some editors write in front of it is no text."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import BinaryIO

from .errors import SbdFileError, SbdFileNotFoundError, SbdValueError

_MOST_BYTES = 1 << 28


def read_text(path: Path) -> str:
    """Raises SbdFileNotFoundError, SbdFileError and SbdValueError, all naming the file."""
    try:
        with path.open("rb") as file:
            data = _read(file, str(path))
    except FileNotFoundError:
        raise SbdFileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise SbdFileError(f"{path}: cannot be read: {error.strerror}") from None
    return decode_utf8(data, str(path))


def read_standard_input() -> str:
    """Raises SbdValueError."""
    source = "standard input"
    return decode_utf8(_read(sys.stdin.buffer, source), source)


def _read(file: BinaryIO, source: str) -> bytes:
    """A device has no end."""
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise SbdValueError(f"{source}: expected a text of at most {_MOST_BYTES} bytes, got more")
    return data


def decode_utf8(data: bytes, source: str) -> str:
    """`source` names where the bytes come from, for the error."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = ": it begins as UTF-16 does, save it as UTF-8" if utf16 else ""
        raise SbdValueError(
            f"{source}: expected UTF-8 text, got byte 0x{data[error.start]:02x} "
            f"at offset {error.start}{hint}"
        ) from None
