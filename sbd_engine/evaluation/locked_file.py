"""A file that one process at a time may have."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from io import FileIO
from pathlib import Path

from ..errors import SbdFileError

_FLOCK = "hhqqi"  # struct flock: type, whence, start, length, pid


def open_locked(path: Path) -> FileIO:
    """`path`, made where it is missing, for reading and writing; closing it lets it go. A link is
    not followed: who may write beside it could have it lead anywhere. Raises SbdFileError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SbdFileError(f"{path}: expected a file, got a symbolic link") from None
        raise SbdFileError(f"{path}: cannot be written: {error.strerror}") from None
    file = FileIO(descriptor, "r+")
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SbdFileError(f"{path}: expected a file, got a pipe or a device")
        _lock(descriptor, path)
    except BaseException:
        file.close()
        raise
    return file


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise SbdFileError(
            f"{path}: {_holder(descriptor)} is writing there: wait until it has ended, or give "
            "another file"
        ) from None
    except OSError as error:
        raise SbdFileError(f"{path}: cannot be locked: {error.strerror}") from None


def _holder(descriptor: int) -> str:
    """Who has the lock, as far as this machine knows."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    if pid <= 0:
        return "another process"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return f"process {pid}"
    words = [Path(os.fsdecode(word)).name for word in command if not word.startswith(b"-")]
    return f"process {pid} ({' '.join(words[:3]):.60})"
