"""Options and output that several commands share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .. import _core, parameters
from ..errors import SbdValueError
from ..json_values import finite
from ..server.settings import Settings
from ..sizes import parse_size
from ..text_file import read_text

if TYPE_CHECKING:
    from ..engine import Engine

debug = False  # --debug: errors come with their traceback


def _set_debug(wanted: bool) -> None:
    global debug
    debug = debug or wanted


Model = Annotated[
    Path | None, typer.Argument(metavar="MODEL", help="A model file; without: the demo model.")
]
ModelFlag = Annotated[Path | None, typer.Option("--model", "-m", help="The same, as a flag.")]
_DECODING, _SAMPLING, _CONSTRAINT = "Decoding", "Sampling", "What the text must be, one of:"

MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", "-n", help="New tokens at most.", rich_help_panel=_DECODING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this string; may be repeated.", rich_help_panel=_DECODING),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos",
        help="An end-of-sequence token does not end the text.",
        rich_help_panel=_DECODING,
    ),
]
Decoder = Annotated[
    str,
    typer.Option(
        help="auto, ntp, sbd, sbd_lossless, dmtd, d2f or a family's own: `inspect` shows which a "
        "file can run.",
        rich_help_panel=_DECODING,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        "--temp",
        help="0 takes the most probable token.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int, typer.Option(help="Keep the k most probable; 0: all.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float,
    typer.Option(help="Keep the most probable up to this sum.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Leave out what is less probable than this share of the most probable.",
        rich_help_panel=_SAMPLING,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN=BIAS",
        help="A token id and what is added to its logit: -100 all but forbids it, 100 all but "
        "forces it; may be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Positive logits of tokens of prompt and text are divided by it, negative ones "
        "multiplied; 1: none. llama.cpp's --repeat-penalty is the same.",
        rich_help_panel=_SAMPLING,
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        help="Taken off the logits of tokens of the new text, -2 to 2.", rich_help_panel=_SAMPLING
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        help="The same, for each time that the token is there.", rich_help_panel=_SAMPLING
    ),
]
Seed = Annotated[int, typer.Option(help="Same seed, same text.", rich_help_panel=_SAMPLING)]

JsonSchema = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="JSON of the JSON Schema in this file.", rich_help_panel=_CONSTRAINT
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="What this regular expression matches as a whole; Rust's syntax.",
        rich_help_panel=_CONSTRAINT,
    ),
]
Grammar = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="By the grammar in this file; Lark's syntax.",
        rich_help_panel=_CONSTRAINT,
    ),
]
Choices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="This, or another such: repeat it.", rich_help_panel=_CONSTRAINT
    ),
]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Engine")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", help="Without: one per available core.", rich_help_panel="Engine"
    ),
]
NCtx = Annotated[
    int | None,
    typer.Option(
        "--n-ctx",
        "-c",
        help="Positions of the KV cache; without: the model's.",
        rich_help_panel="Engine",
    ),
]
Draft = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        "--draft-lora",
        metavar="FILE",
        help="An adapter that drafts for the model, whose text stays the same.",
        rich_help_panel="Engine",
    ),
]
KvBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Of all KV caches, such as 2GiB or 512MiB. Without: nine tenths of the memory that is "
        "free once the model is loaded.",
        rich_help_panel="Engine",
    ),
]
KvDtype = Annotated[str, typer.Option(help="f16, bf16, f32 or q8_0.", rich_help_panel="Engine")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks of errors.", callback=_set_debug)
]

# Of Engine.generate: what `eval` passes on as it is.
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "seed")

TYPES = {"int": int, "float": float, "str": str}
Command = TypeVar("Command", bound=Callable[..., Any])


def with_decoding(command: Command) -> Command:
    """The command with a flag for each of the engine's options of decoding, behind --decoder; it
    gets them all as keywords."""
    own = signature(command, eval_str=True)
    taken = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    flags = [
        Parameter(
            option.name,
            Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[
                TYPES[option.type] | None,
                typer.Option(
                    help=f"{option.help} Without: the model's.", rich_help_panel=_DECODING
                ),
            ],
        )
        for option in _core.OPTIONS
    ]
    behind = [p.name for p in taken].index("decoder") + 1
    taken[behind:behind] = flags
    return with_parameters(command, taken)


def with_parameters(command: Command, taken: Sequence[Parameter]) -> Command:
    """The command as one that takes these."""
    command.__signature__ = Signature(taken)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in taken}
    return command


def one_model(model: Path | None, flag: Path | None) -> Path | None:
    """The model file, by either way to name it."""
    if model is not None and flag is not None:
        raise SbdValueError("expected the model as MODEL or --model, got both")
    return flag if model is None else model


def in_bytes(kv_budget: str | None) -> int | None:
    return None if kv_budget is None else parse_size("--kv-budget", kv_budget)


def check_drafts(draft: Path | None, engine: Engine, decoder: str) -> None:
    """Refuses a --draft that nothing drafts with."""
    name = engine.auto_decoder if decoder == "auto" else decoder
    if draft is not None and name not in _core.DRAFTING:
        raise SbdValueError(
            f'--draft has no effect with decoder "{name}", which does not draft: leave it out, or '
            f"use --decoder {engine.auto_decoder}"
        )


def is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def given(context: typer.Context, names: Sequence[str]) -> dict[str, Any]:
    """The values of those options of the command."""
    return {name: context.params[name] for name in names}


_FILES = ("json_schema", "grammar")


def constraint(context: typer.Context) -> dict[str, Any]:
    """What the text must be, as arguments of Engine.generate; some are in files."""
    values = given(context, [name for name in parameters.CONSTRAINTS if is_given(context, name)])
    return {
        name: read_text(Path(value)) if name in _FILES else value for name, value in values.items()
    }


# Arguments of Engine and its calls whose flag has another name.
_FLAGS = {"n_threads": "--threads"}
_ARGUMENTS = {
    *(field.name for field in fields(parameters.Parameters)),
    *parameters.CONSTRAINTS,
    *(option.name for option in _core.OPTIONS),
    *(field.name for field in fields(Settings)),
}


def in_flags(message: str) -> str:
    """An error with the flag in place of each argument that it names, as `gamma`."""

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        if name not in _ARGUMENTS:
            return match[0]
        return _FLAGS.get(name, f"--{name.replace('_', '-')}")

    return re.sub(r"`(\w+)`", flag, message)


# A model, or its file, may write escape sequences; a terminal would obey them, as it would change
# the direction in which what follows is read.
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_OBEYED = (*range(32), *range(127, 160), *_DIRECTIONS)
_CONTROLS = {code: None for code in _OBEYED if chr(code) not in "\n\t"}
# Of them, and of what others take for a line's end, those that JSON would let stand in a string.
_ESCAPED = {code: f"\\u{code:04x}" for code in (*_OBEYED[32:], 0x2028, 0x2029)}


def terminal_safe(text: str) -> str:
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """What a file or an error says, so that it cannot look like another line of ours."""
    return terminal_safe(" ".join(text.split()))


def print_json(values: Any) -> None:
    text = json.dumps(finite(values), ensure_ascii=False, allow_nan=False)
    print(text.translate(_ESCAPED), flush=True)


def note(message: str) -> None:
    print("note:", one_line(message), file=sys.stderr)
