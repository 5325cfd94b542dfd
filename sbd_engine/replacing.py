"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import SbdFileError


@contextmanager
def replacing(path: Path, like: os.stat_result | None = None) -> Iterator[Path]:
    """A new file beside `path`, under a name that nobody can foresee, that takes its place once the
    body has ended well; until then all that stood there stands. like: whose owner and rights it
    gets, None for the usual ones. Raises SbdFileError where the operating system refuses, a full
    disk for one."""
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        rights = 0o666 if like is None else 0o600
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, rights)
        try:
            yield temporary
            if like is not None:
                with suppress(PermissionError):  # only root gives files away
                    os.fchown(descriptor, like.st_uid, like.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
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
