"""The subcommands of `sbd-engine`."""

from __future__ import annotations

from shutil import get_terminal_size
from typing import Annotated

import typer

from ..errors import SbdValueError
from .bench import bench
from .chat import chat
from .eval import evaluate
from .generate import generate
from .importance import importance
from .inspect import inspect
from .perplexity import perplexity
from .requantise import requantise
from .run import run
from .serve import serve
from .set_keys import set_keys
from .sweep import sweep

_OTHER_NAMES = {
    "repeat-penalty": "repetition-penalty"
}  # of options, as llama.cpp's users know them

app = typer.Typer(
    name="sbd-engine",
    help="Set Block Decoding: several tokens per forward of an ordinary transformer.",
    add_completion=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Beside its own name in a table of help it would be cut on a terminal of 80 columns.
        "token_normalize_func": lambda name: _OTHER_NAMES.get(name, name),
    },
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(chat)
app.command()(inspect)
app.command()(bench)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(sweep)
app.command()(perplexity)
app.command()(serve)
app.command("set")(set_keys)
app.command()(requantise)
app.command()(importance)

# Boxes around the help of less width would cut the names of options.
_LEAST_BOXED = 80

# The parser's own errors: missing or malformed options. Typer has its base by no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def invoke(arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns its exit code. A usage error becomes an
    SbdValueError."""
    if get_terminal_size().columns < _LEAST_BOXED:
        app.rich_markup_mode = None
    try:
        code = app(arguments, prog_name="sbd-engine", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _UsageError as error:
        raise SbdValueError(error.format_message()) from None  # type: ignore[attr-defined]
    return code if isinstance(code, int) else 0


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def convert(context: typer.Context) -> object:
    """Convert a Hugging Face checkpoint into one model file."""
    # The converter's own command, loaded only here: its libraries cost other commands 0.2 s.
    from ..convert.hf_to_sbd import app as converter

    return converter(context.args, prog_name="sbd-engine convert", standalone_mode=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"sbd-engine {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass
