"""`sbd-engine set`: how a model file wants to be decoded, changed where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SbdValueError
from . import options
from .options import one_line, print_json


def set_keys(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Keys as `convert --set` takes them: sbd.gamma=0.1 or gamma=0.1.",
        ),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Remove this key; may be repeated."),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Change a model file's sbd.* keys in place: its default decoder, gamma, ...

    The tensors are copied as they are. The file is replaced as a whole, and
    only by one that the engine can run; what has it open keeps the old one.
    """
    from ..convert.settings import full_key, parse_settings
    from ..key_editor import edit_keys

    values = parse_settings(settings or [], option="")
    removed = [full_key(name) for name in unset or []]
    if not values and not removed:
        raise SbdValueError("set: expected KEY=VALUE or --unset KEY, got neither")
    for key in removed:
        if key in values:
            raise SbdValueError(f"set: {key} is given a value and to --unset")
    before = edit_keys(model, values, removed)
    after: dict[str, Any] = {key: v for key, v in before.items() if key not in removed} | values
    if json:
        print_json({"file": str(model), "before": before, "after": after})
    else:
        for key in [*values, *removed]:
            line = f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}"
            print(one_line(line if before.get(key) != after.get(key) else f"{line} (as it was)"))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
