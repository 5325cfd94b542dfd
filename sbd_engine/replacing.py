"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SbdFileError


@contextmanager
def replacing(path: Path, rights: int | None = None) -> Iterator[Path]:
    """A new file beside `path`, under a name that nobody can foresee, that takes its place once the
    body has ended well; until then all that stood there stands. rights: None is the usual ones.
    Raises SbdFileError where the operating system refuses, a full disk for one."""
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        usual = 0o666 if rights is None else 0o600
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, usual)
        try:
            yield temporary
            if rights is not None:
                os.fchmod(descriptor, rights)
            os.fsync(descriptor)
            temporary.replace(path)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, SbdFileError):
            raise
        raise SbdFileError(f"{path}: cannot be written: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    """So that the new name is on the disk as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
