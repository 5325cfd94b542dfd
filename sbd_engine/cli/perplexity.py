"""`sbd-engine perplexity`: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdValueError
from . import experiment, options
from .options import print_json

if TYPE_CHECKING:
    from ..engine import Engine
    from ..tokenizer import Tokenizer

WINDOW = 512  # llama.cpp's
_LEAST = 3
_MOST_LOSS = 700.0  # whose exp a float holds


def perplexity(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[MODEL] FILE",
            help="A model file, without: the demo model; and a text, - for standard input.",
        ),
    ],
    model_flag: options.ModelFlag = None,
    n_ctx: Annotated[
        int | None,
        typer.Option(
            "--n-ctx",
            "-c",
            help=f"Tokens per window; without: {WINDOW}, or the model's context if that is less.",
        ),
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    kv_dtype: options.KvDtype = "f16",
    json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Measure how well a model predicts a text.

    Perplexity is exp of the mean of -log p over the text's tokens, p being
    each one's probability behind those before it: next-token decoding, whatever
    the file's decoder.

    As llama.cpp does it, so that figures compare: the text is cut into windows
    of --n-ctx tokens, each read from an empty cache, the first token in BOS's
    place where the model has one. The first half of a window is context only,
    the second counts. What is left behind the last window is not counted; a
    text shorter than a window is one. The error is the standard one of the
    mean, as llama.cpp has it.
    """
    from ..engine import Engine
    from .console import progress

    first, file = _model_and_file(paths)
    model = options.one_model(first, model_flag)
    text = _text(file)
    with Engine(model, device, threads, n_ctx, kv_dtype, prefix_cache=0) as engine:
        windows = windows_of(engine.tokenizer, text, min(n_ctx or WINDOW, engine.n_ctx))
        losses: list[float] = []
        done = 0
        interrupted = False
        with progress("windows", len(windows)) as show:
            try:
                for done, window in enumerate(_losses(engine, windows), 1):
                    losses += window
                    show(done)
            except KeyboardInterrupt:
                interrupted = True
        report = {
            "model": experiment.model_name(model),
            "file": str(file),
            "device": engine.device,
            "n_threads": engine.n_threads,
            "n_ctx": len(windows[0]),
            "windows": done,
            "tokens": len(losses),
            **_figures(losses),
        }
    if json:
        print_json(report)
    elif losses:
        _print_report(report)
    if interrupted:
        options.note(f"interrupted after {done} of {len(windows)} windows")
    return 130 if interrupted else 0


def _model_and_file(paths: Sequence[Path]) -> tuple[Path | None, Path]:
    if len(paths) > 2:
        raise SbdValueError(f"expected [MODEL] FILE, got {len(paths)} paths")
    return (paths[0] if len(paths) == 2 else None), paths[-1]


def _text(file: Path) -> str:
    from ..text_file import read_standard_input, read_text

    return read_standard_input() if str(file) == "-" else read_text(file)


def windows_of(tokenizer: Tokenizer, text: str, size: int) -> list[list[int]]:
    ids, bos = tokenizer.encode(text), tokenizer.encode("")
    # The second half of three tokens is one; of fewer it is none.
    for what, count in ((f"a text of {_LEAST} tokens", len(ids)), (f"--n-ctx {_LEAST}", size)):
        if count < _LEAST:
            raise SbdValueError(f"expected {what} at least, got {count}")
    size = min(size, len(ids))
    starts = range(0, len(ids) - size + 1, size)
    return [bos + ids[start + len(bos) : start + size] for start in starts]


def _losses(engine: Engine, windows: Sequence[Sequence[int]]) -> Iterator[list[float]]:
    """-log p of the tokens that count, of each window."""
    for window in windows:
        counted = engine.score(window).logprobs[len(window) // 2 + 1 :]
        yield [-logprob for logprob in counted if logprob is not None]


def _figures(losses: Sequence[float]) -> dict[str, Any]:
    """Of no loss there is none, of one no error."""
    n = len(losses)
    if n == 0:
        return {"perplexity": None, "error": None, "loss": None}
    mean = math.fsum(losses) / n
    value = math.exp(mean) if mean < _MOST_LOSS else math.inf
    error = None
    if n > 1:
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / n
        error = value * math.sqrt(variance / (n - 1))
    return {"perplexity": value, "error": error, "loss": mean}


def _print_report(report: dict[str, Any]) -> None:
    from .console import Console

    console = Console(markup=False)
    error = "" if report["error"] is None else f" +/- {report['error']:.4f}"
    experiment.print_engine(console, report)
    windows = "window" if report["windows"] == 1 else "windows"
    console.print(
        f"perplexity {report['perplexity']:.4f}{error}, {report['tokens']} tokens in "
        f"{report['windows']} {windows} of {report['n_ctx']}",
        soft_wrap=True,
    )
