"""Options and output that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

debug = False  # --debug: errors come with their traceback


def _set_debug(wanted: bool) -> None:
    global debug
    debug = debug or wanted


Model = Annotated[
    Path | None, typer.Argument(metavar="MODEL", help="A model file; without: the demo model.")
]
Device = Annotated[str, typer.Option(help="auto or cpu.", rich_help_panel="Engine")]
Threads = Annotated[
    int | None,
    typer.Option(help="Without: one per available core.", rich_help_panel="Engine"),
]
NCtx = Annotated[
    int | None,
    typer.Option(
        "--n-ctx",
        help="Positions of the KV cache; without: the model's.",
        rich_help_panel="Engine",
    ),
]
KvDtype = Annotated[str, typer.Option(help="f16 or f32.", rich_help_panel="Engine")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks of errors.", callback=_set_debug)
]


# A model may write escape sequences; a terminal would obey them.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def terminal_safe(text: str) -> str:
    return text.translate(_CONTROLS)


def print_json(values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)
