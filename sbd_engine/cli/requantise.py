"""`sbd-engine requantise`: a model file in other types."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SbdFileError
from . import options
from .options import one_line


def requantise(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The model file to write.")],
    type: Annotated[
        str, typer.Option(help="Of the weights, as `convert` takes it: q4_k_m, q8_0, ...")
    ],
    importance: Annotated[
        Path | None,
        typer.Option(help="How much each column counts: of `importance`, or llama.cpp's imatrix."),
    ] = None,
    allow_requantise: Annotated[
        bool,
        typer.Option(
            "--allow-requantise", help="Round weights again that were rounded below Q8_0."
        ),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Write a model file in other types, without its checkpoint.

    All keys are kept, and so are the tensors that have their type already. Of
    weights rounded twice more is lost than of those rounded once: those below
    Q8_0 are refused, unless asked for.
    """
    from .. import _core
    from ..convert.requantise import requantise as write
    from ..model_file import existing
    from .console import progress

    if existing(model, "the model").is_dir():
        raise SbdFileError(f"{model}: expected a model file, got a folder")
    _core.read_gguf(model)  # which trusts nothing
    done = 0
    with ExitStack() as stack:
        show: Callable[[int], None] = lambda _: None  # noqa: E731

        def on_start(total: int) -> None:
            nonlocal show
            show = stack.enter_context(progress("bytes", total))

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            show(done)

        written = write(
            model,
            output,
            type=type,
            importance=importance,
            allow_requantise=allow_requantise,
            warn=options.note,
            on_start=on_start,
            on_bytes=on_bytes,
        )
    print(
        one_line(
            f"{output}: {written.n_changed} of {written.n_tensors} tensors made {written.type}, "
            f"{written.n_bytes / 1e6:.1f} MB"
        )
    )
