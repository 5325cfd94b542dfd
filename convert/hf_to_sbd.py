"""The converter's command line: `python convert/hf_to_sbd.py`, and `sbd-engine convert`."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

if not __package__:  # run as a script, from a clone: its folder's modules become a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name
    __import__(__package__)

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .conversion import Conversion, convert
from .errors import ConvertError, one_line
from .mixes import MIXES

# Typer does not export it.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
ERROR_EXIT, SIGNAL_EXIT = 2, 128  # plus the signal's number


def convert_command(
    checkpoint: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR_OR_FILES",
            help="A Hugging Face checkpoint: its folder, or its .safetensors files.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model file to write.")],
    type: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(MIXES)}.")] = "q8_0",
    mask_token: Annotated[
        str | None,
        typer.Option(help="The mask token, or its id. Default: the checkpoint's, if it has one."),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(help="The decode block the model was trained for; makes SBD the default."),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="The entropy bound that the file asks for, in nats.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="The folder of a PEFT LoRA adapter to merge.")
    ] = None,
    draft_lora: Annotated[
        Path | None,
        typer.Option(help="The folder of a PEFT LoRA adapter that drafts: a second file."),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(help="How much each column counts: of `importance`, or llama.cpp's imatrix."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any sbd.* key; may be given again."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint into one model file."""
    try:
        with _terminable(), _progress() as progress:
            task = progress.add_task(output.name, total=None)
            done = convert(
                checkpoint,
                output,
                type=type,
                mask_token=mask_token,
                block_size=block_size,
                gamma=gamma,
                lora=lora,
                draft_lora=draft_lora,
                importance=importance,
                settings=set_ or (),
                warn=lambda line: progress.console.print(
                    f"warning: {one_line(line)}", markup=False, highlight=False, soft_wrap=True
                ),
                on_start=lambda total: progress.update(task, total=total),
                on_bytes=lambda n: progress.update(task, advance=n),
            )
    except (ConvertError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_line(error)}", file=sys.stderr)
        raise typer.Exit(ERROR_EXIT) from None
    except KeyboardInterrupt as end:
        print("interrupted: nothing written", file=sys.stderr)
        number = end.args[0] if isinstance(end, _Terminated) else signal.SIGINT
        raise typer.Exit(SIGNAL_EXIT + number) from None
    print(_summary(done))


class _Terminated(KeyboardInterrupt):
    """Asked to end by the signal of that number."""


@contextmanager
def _terminable() -> Iterator[None]:
    """What else ends a command ends it as Ctrl-C does: nothing half-written stays. The first signal
    counts; a second would cut the cleaning up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that was set to be ignored, as by nohup, stays so.
    kinds = [k for k in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(k) is signal.SIG_DFL]

    def end(number: int, _: object) -> None:
        for kind in kinds:
            signal.signal(kind, signal.SIG_IGN)
        raise _Terminated(number)

    for kind in kinds:
        signal.signal(kind, end)
    try:
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    rates = (TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(
        *columns, *rates, console=console, transient=True, disable=not console.is_terminal
    )


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return one_line(said)
    return one_line(str(error))


def _summary(done: Conversion) -> str:
    output, draft = one_line(str(done.output)), one_line(str(done.draft))
    tail = f"\n{draft}: the adapter that drafts for it" if done.draft else ""
    return (
        f"{output}: {done.n_tensors} tensors, {done.type}, {done.n_bytes / 1e6:.1f} MB, "
        f"decoders: {', '.join(done.decoders)}{tail}"
    )


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert_command)


def main() -> None:
    """Run the command alone. A wrong option is one line too, and the same exit code."""
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        print(f"error: {one_line(error.format_message())}", file=sys.stderr)
        code = ERROR_EXIT
    sys.exit(code)


if __name__ == "__main__":
    main()
