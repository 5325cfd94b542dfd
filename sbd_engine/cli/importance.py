"""`sbd-engine importance`: which columns of a model's weights count most, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import one_line


def importance(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    text: Annotated[Path, typer.Option(help="A text such as the model will meet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    n_ctx: options.NCtx = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure which columns of a model's weights count most.

    The text is read in windows of --n-ctx tokens (512), as `perplexity` reads
    it, and the squares of what each column is multiplied by are summed:
    llama.cpp's importance matrix, in its file format. `convert` and
    `requantise` take it as --importance, to lose less where it matters.
    """
    import numpy as np
    import numpy.typing as npt

    from .. import _core
    from ..convert.importance import write_importance
    from ..convert.writer import check_output
    from ..engine import Engine
    from ..text_file import read_text
    from .console import progress
    from .perplexity import WINDOW, windows_of

    check_output(output, [model, text], "one of the files to read")
    with Engine(model, "cpu", threads, n_ctx, prefix_cache=0) as engine:
        windows = windows_of(engine.tokenizer, read_text(text), min(n_ctx or WINDOW, engine.n_ctx))
        sums: dict[str, tuple[int, npt.NDArray[np.float64]]] = {}
        with progress("windows", len(windows)) as show:
            for done, window in enumerate(windows, 1):
                for name, (rows, squares) in engine.input_squares(window).items():
                    before, so_far = sums.get(name, (0, np.zeros_like(squares)))
                    sums[name] = before + rows, so_far + squares
                show(done)
    architecture = str(_core.read_gguf(model)["metadata"]["general.architecture"])
    write_importance(
        output,
        sums,
        architecture=architecture,
        datasets=[text.name],
        chunks=len(windows),
        chunk_size=len(windows[0]),
    )
    tokens = sum(map(len, windows))
    print(one_line(f"{output}: {len(sums)} weights, {tokens} tokens in {len(windows)} windows"))
