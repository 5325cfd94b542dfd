"""Which file an argument means."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path

from .errors import SbdFileError, SbdFileNotFoundError, SbdTypeError, brief

ModelPath = str | os.PathLike[str]


def model_file(path: ModelPath | None) -> AbstractContextManager[Path]:
    """The model file at `path`, or the embedded demo model for None, for use in a `with`."""
    if path is None:
        demo = files("sbd_engine") / "models" / "demo.bin"
        if not demo.is_file():
            raise SbdFileNotFoundError(
                "this installation has no demo model (sbd_engine/models/demo.bin): "
                "give a model file"
            )
        return as_file(demo)
    file = existing(path, "the model")
    if file.is_dir():
        raise SbdFileError(
            f"{file}: expected a model file, got a folder; make one from a checkpoint with: "
            f"sbd-engine convert {file} -o model.bin"
        )
    return nullcontext(file)


def existing(path: ModelPath, what: str) -> Path:
    """`path` where something is there; `what` the argument should be, for the error."""
    if not isinstance(path, (str, os.PathLike)):
        raise SbdTypeError(f"expected {what} as a path, got {brief(path)}")
    file = Path(path)
    if not file.exists():
        raise SbdFileNotFoundError(f"{file}: no such file")
    return file
