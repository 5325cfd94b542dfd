"""The subcommands of `sbd-engine`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from shutil import get_terminal_size
from typing import Annotated

import typer

from ..errors import SbdValueError

# Each one's file here and function there, in the order of the help. One is imported where it is
# wanted: all of them, with all their options, take 0.2 s.
_COMMANDS = {
    "run": ("run", "run"),
    "chat": ("chat", "chat"),
    "inspect": ("inspect", "inspect"),
    "bench": ("bench", "bench"),
    "generate": ("generate", "generate"),
    "eval": ("eval", "evaluate"),
    "sweep": ("sweep", "sweep"),
    "perplexity": ("perplexity", "perplexity"),
    "serve": ("serve", "serve"),
    "set": ("set_keys", "set_keys"),
    "requantise": ("requantise", "requantise"),
    "importance": ("importance", "importance"),
}

_OTHER_NAMES = {
    "repeat-penalty": "repetition-penalty"
}  # of options, as llama.cpp's users know them

# Boxes around the help of less width would cut the names of options.
_LEAST_BOXED = 80

# The parser's own errors: missing or malformed options. Typer has its base by no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def invoke(arguments: list[str]) -> int:
    """Runs the command that the arguments name; returns its exit code. A usage error becomes an
    SbdValueError."""
    app = parser_of(_wanted(arguments[0]))
    if get_terminal_size().columns < _LEAST_BOXED:
        app.rich_markup_mode = None
    try:
        code = app(arguments, prog_name="sbd-engine", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _UsageError as error:
        raise SbdValueError(error.format_message()) from None  # type: ignore[attr-defined]
    return code if isinstance(code, int) else 0


def _wanted(first: str) -> Iterable[str]:
    if first in _COMMANDS:
        return [first]
    return () if first in ("convert", "--version") else _COMMANDS


def parser_of(commands: Iterable[str] = _COMMANDS) -> typer.Typer:
    """The command line with these commands, by default all, and convert."""
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
    for name in commands:
        file, function = _COMMANDS[name]
        app.command(name)(getattr(import_module(f".{file}", __package__), function))
    app.command(
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(convert)
    app.callback()(_root)
    return app


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


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass
