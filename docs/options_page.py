"""Makes docs/options.md of the engine's table of options and the command line's flags:

python docs/options_page.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from sbd_engine import _core
from sbd_engine.cli.app import parser_of
from sbd_engine.parameters import Options

PAGE = Path(__file__).with_name("options.md")


def page() -> str:
    methods = {option.name for option in _core.OPTIONS}
    flags = {flag.name: flag for flag in _flags("run")}
    common = [flags[name] for name in Options.__annotations__ if name in flags.keys() - methods]
    parts = [
        "# Options of decoding",
        "Made by `python docs/options_page.py`.",
        "Each is a keyword argument of `generate` and its like in Python, a flag of the commands "
        "that decode, with hyphens,\nand a field of the [server's](serving.md) requests. One that "
        "the decoder, or its rule of unmasking, would not read is refused.",
        "## Of the methods",
        "A model file's `sbd.*` key takes the place of the default, a request of both; "
        "`sbd-engine inspect` shows what a file comes\nto. `sbd_lossless` and `nemotron_spec` "
        "draft as far as pays where no `block_size` is given.",
        _table(
            ["option", "key", "range", "default", "what it is for", "decoders"],
            (
                [
                    f"`{option.name}`",
                    f"`sbd.{option.key}`",
                    ", ".join(f"`{name}`" for name in option.choices) or option.expected,
                    _shown(option.default),
                    option.help,
                    ", ".join(f"`{name}`" for name in option.decoders),
                ]
                for option in _core.OPTIONS
            ),
        ),
        "## Of every decoder",
        _table(
            ["option", "flag", "default", "what it is for"],
            (
                [
                    f"`{flag.name}`",
                    ", ".join(f"`{each}`" for each in flag.opts),
                    _shown(flag.default),
                    flag.help,
                ]
                for flag in common
            ),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _flags(command: str) -> Iterable[Any]:
    group: Any = typer.main.get_command(parser_of())
    return (flag for flag in group.commands[command].params if flag.param_type_name == "option")


def _shown(default: object) -> str:
    """Of a float32 as many digits as tell it from its neighbours."""
    if default is None:
        return ""
    return f"`{default:.7g}`" if isinstance(default, float) else f"`{default}`"


def _table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    PAGE.write_text(page())
