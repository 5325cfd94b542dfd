"""A file that is whole or not there, with the package's errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .convert.replacing import replacing as replacing_all
from .errors import SbdFileError


@contextmanager
def replacing(path: Path, like: os.stat_result | None = None) -> Iterator[Path]:
    """`convert.replacing` for one file. Raises SbdFileError where the operating system refuses, a
    full disk for one."""
    try:
        with replacing_all([path], like) as (temporary,):
            yield temporary
    except OSError as error:
        if isinstance(error, SbdFileError):
            raise
        raise SbdFileError(f"{path}: cannot be written: {error.strerror or error}") from None
