"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(paths: Sequence[Path], like: os.stat_result | None = None) -> Iterator[list[Path]]:
    """New files beside `paths`, in one folder, that take their places once the body has ended well:
    until then all that stood there stands. like: whose owner and rights they get, None for the
    usual ones."""
    rights = 0o666 if like is None else 0o600
    temporaries = list[Path]()
    with ExitStack() as left_behind:
        descriptors = []
        for path in paths:
            # A name that nobody can foresee, and known before the file is there to be removed.
            part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
            left_behind.callback(part.unlink, missing_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, rights)
            left_behind.callback(os.close, descriptor)
            temporaries.append(part)
            descriptors.append(descriptor)
        yield temporaries
        for descriptor in descriptors:
            if like is not None:
                with suppress(PermissionError):  # only root gives files away
                    os.fchown(descriptor, like.st_uid, like.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
            os.fsync(descriptor)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    folder = os.open(paths[0].parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new names are on the disk as well
    finally:
        os.close(folder)
