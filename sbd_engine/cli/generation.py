"""What `run` and `chat` share: options of a generation, its text as it comes, its figures."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import parameters
from ..errors import SbdValueError
from . import options
from .options import terminal_safe

if TYPE_CHECKING:
    from ..completion import Chunk, Completion
    from ..engine import Engine
    from ..streams import Stream

INPUT, OUTPUT = "Prompt", "Output"
CHAT_MAX_TOKENS = 4096  # of an answer: a chat model ends it itself

TemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="What the chat template takes, such as enable_thinking=false: JSON, or else a "
        "string; may be repeated.",
        rich_help_panel=INPUT,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        "-s",
        help="Same seed, same text. Without: another one each time, which is told.",
        rich_help_panel="Sampling",
    ),
]
ShowBlocks = Annotated[
    bool,
    typer.Option(
        "--show-blocks",
        help="Show each block filling in (on a terminal).",
        rich_help_panel=OUTPUT,
    ),
]
KeepBlocks = Annotated[
    bool,
    typer.Option(
        "--keep-blocks",
        help="The same, a line for each forward that stays on the screen.",
        rich_help_panel=OUTPUT,
    ),
]
Delay = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="Show each forward's block so long.", rich_help_panel=OUTPUT
    ),
]


def check_delay(delay: float | None, show_blocks: bool) -> float:
    if delay is None:
        return 0.0
    if not show_blocks:
        raise SbdValueError("--delay has no effect without --show-blocks or --keep-blocks")
    if not 0 <= delay < math.inf:  # NaN too
        raise SbdValueError(f"expected --delay as seconds >= 0, got {delay:g}")
    return delay


def on_a_terminal(show_blocks: bool) -> bool:
    """Whether blocks can be shown where they are wanted; says so where not."""
    if show_blocks and not sys.stdout.isatty():
        options.note("--show-blocks needs a terminal: writing plain text")
        return False
    return show_blocks


def asked(context: typer.Context) -> dict[str, Any]:
    """The options of Engine.generate that the command line gives; the others are its defaults."""
    given = {
        name: value
        for name, value in context.params.items()
        if name in parameters.Options.__annotations__ and _is_given(context, name)
    }
    if "logit_bias" in given:
        given["logit_bias"] = biases(given["logit_bias"])
    return given


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def biases(texts: Sequence[str]) -> dict[int, float]:
    """--logit-bias, each TOKEN=BIAS."""
    found: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise SbdValueError(
                f"expected --logit-bias TOKEN=BIAS, such as 42=-100, got {text!r}"
            ) from None
        if number in found:
            raise SbdValueError(f"--logit-bias names token {number} twice: give it once")
        found[number] = value
    return found


def drawn_seed(temperature: float) -> int | None:
    """One where it has an effect and none was given."""
    return secrets.randbits(32) if temperature > 0 else None


def note_decoder(engine: Engine, decoder: str) -> None:
    if decoder == "auto" and engine.auto_decoder == "ntp":
        options.note("this model does not say that it can decode blocks: decoding with ntp")


def show_blocks(
    engine: Engine, stream: Stream, asked: dict[str, Any], delay: float, keep: bool
) -> None:
    from .blocks import show

    in_force = engine.resolve(**asked)
    # Without a block size the new text is one block.
    size = in_force.get("block_size", 1) or in_force["max_tokens"]
    show(engine, stream, size, delay, keep)


def write(chunks: Iterator[Chunk], stream: Stream, quiet: bool = False) -> None:
    """Writes each chunk at once; after an interruption, all that was committed, and a line end."""
    shown: Callable[[str], str] = terminal_safe if sys.stdout.isatty() else str
    written = 0
    try:
        for chunk in chunks:
            if chunk.text and not quiet:
                sys.stdout.write(shown(chunk.text))
                sys.stdout.flush()
                written += len(chunk.text)
    finally:
        if not quiet:
            stream.close()
            print(shown(stream.completion.text[written:]), flush=True)


def print_figures(completion: Completion, seed: int | None) -> None:
    from .console import Console

    stats = completion.stats
    count = len(completion.tokens)
    line = (
        f"{count} token{'s' if count != 1 else ''}, "
        f"{stats.nfe} forward{'s' if stats.nfe != 1 else ''} (NFE), "
        f"{stats.tokens_per_forward:.2f} tokens per forward, {stats.decode_tok_s:.1f} tok/s, "
        f"first token after {stats.ttft_ms:.0f} ms"
    )
    if stats.drafts is not None and stats.drafts.guesses:
        line += f", {stats.drafts.accepted} of {stats.drafts.guesses} drafted tokens accepted"
    if stats.thinking_forwards is not None:
        line += f", {stats.thinking_forwards} forwards through the thinking layers"
    if stats.cached_tokens:
        line += f", {stats.cached_tokens} of {stats.prompt_tokens} prompt tokens cached"
    if seed is not None:
        line += f", seed {seed}"
    Console(stderr=True).print(line, style="dim", soft_wrap=True)
