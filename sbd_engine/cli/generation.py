"""What `run`, `chat` and `generate` share: options of a generation, its text as it comes, its
figures."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import parameters
from ..errors import SbdValueError
from . import options
from .options import Command, terminal_safe

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


def _flags(
    max_tokens: options.MaxTokens,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    decoder: options.Decoder = "auto",
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    logit_bias: options.LogitBias = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            "-s",
            help="Same seed, same text. Without: another one each time, which is told.",
            rich_help_panel="Sampling",
        ),
    ] = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.Grammar = None,
    choices: options.Choices = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    draft: options.Draft = None,
    kv_budget: options.KvBudget = None,
) -> None:
    """What all of them take, behind --template-arg."""


def _block_flags(
    show_blocks: Annotated[
        bool,
        typer.Option(
            "--show-blocks",
            help="Show each block filling in (on a terminal).",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    keep_blocks: Annotated[
        bool,
        typer.Option(
            "--keep-blocks",
            help="The same, a line for each forward that stays on the screen.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    delay: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Show each forward's block so long.", rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """What those take that show a text as it comes."""


def with_flags(max_tokens: int, blocks: bool = True) -> Callable[[Command], Command]:
    """Gives a command these flags, with that default, but for those that it has itself, and those
    of the engine's options; it gets them as keywords."""

    def add(command: Command) -> Command:
        own = signature(command, eval_str=True).parameters
        taken = [p for p in own.values() if p.kind is not Parameter.VAR_KEYWORD]
        behind = [p.name for p in taken].index("template_arg") + 1
        length, *others = _parameters_of(_flags)
        others += _parameters_of(_block_flags) if blocks else []
        others = [p for p in others if p.name not in own]
        taken[behind:behind] = [length.replace(default=max_tokens), *others]
        return options.with_decoding(options.with_parameters(command, taken))

    return add


def _parameters_of(function: Callable[..., None]) -> list[Parameter]:
    return [*signature(function, eval_str=True).parameters.values()]


def engine(context: typer.Context) -> Engine:
    """The one that the flags describe."""
    from ..engine import Engine

    flags = context.params
    return Engine(
        options.one_model(flags["model"], flags["model_flag"]),
        flags["device"],
        flags["threads"],
        flags["n_ctx"],
        flags["kv_dtype"],
        flags["draft"],
        options.in_bytes(flags["kv_budget"]),
    )


def check_engine(context: typer.Context, engine: Engine) -> None:
    decoder = context.params["decoder"]
    options.check_drafts(context.params["draft"], engine, decoder)
    if decoder == "auto" and engine.auto_decoder == "ntp":
        options.note("this model does not say that it can decode blocks: decoding with ntp")


def asked(context: typer.Context) -> dict[str, Any]:
    """The options of Engine.generate that the command line gives; the others are its defaults."""
    given = {
        name: value
        for name, value in context.params.items()
        if name in parameters.OPTION_NAMES and options.is_given(context, name)
    }
    if "logit_bias" in given:
        given["logit_bias"] = biases(given["logit_bias"])
    return given | options.constraint(context)


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


def drawn_seed() -> int:
    return secrets.randbits(32)


def wants_blocks(context: typer.Context) -> bool:
    """Whether they are asked for; raises SbdValueError for a --delay that they have no use for."""
    wanted: bool = context.params["show_blocks"] or context.params["keep_blocks"]
    delay = context.params["delay"]
    if delay is not None:
        if not wanted:
            raise SbdValueError("--delay has no effect without --show-blocks or --keep-blocks")
        if not 0 <= delay < math.inf:  # NaN too
            raise SbdValueError(f"expected --delay as seconds >= 0, got {delay:g}")
    return wanted


class Blocks:
    """Texts with their blocks filling in, where they are wanted and there is a terminal."""

    def __init__(self, context: typer.Context, engine: Engine) -> None:
        self._engine = engine
        self._delay, self._keep = context.params["delay"] or 0.0, context.params["keep_blocks"]
        self.wanted = wants_blocks(context)
        if self.wanted and not sys.stdout.isatty():
            self.wanted = False
            options.note("--show-blocks needs a terminal: writing plain text")

    def show(self, stream: Stream, asked: dict[str, Any]) -> None:
        from .blocks import show

        in_force = self._engine.resolve(**asked)
        # Without a block size the new text is one block.
        size = in_force.get("block_size", 1) or in_force["max_tokens"]
        show(self._engine, stream, size, self._delay, self._keep)


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
