"""`sbd-engine run`: text from a prompt, written as it becomes final."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdValueError
from . import options
from .options import print_json, terminal_safe
from .prompt import read_prompt, template_argument, unescaped

if TYPE_CHECKING:
    from ..completion import Chunk, Completion
    from ..engine import Engine
    from ..streams import Stream

_INPUT, _OUTPUT = "Prompt", "Output"


@options.with_decoding
def run(
    context: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help=r"The prompt, as it is: \n is two characters, but for -e. - reads standard input.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file with the prompt.", rich_help_panel=_INPUT),
    ] = None,
    escape: Annotated[
        bool,
        typer.Option(
            "--escape",
            "-e",
            help=r"\n, \t, \r, \\ and \xHH in --prompt and --stop stand for what they do in C.",
            rich_help_panel=_INPUT,
        ),
    ] = False,
    chomp: Annotated[
        bool,
        typer.Option(
            "--chomp",
            help="Leave out the line end that a piped prompt or --file ends with.",
            rich_help_panel=_INPUT,
        ),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Put the prompt into the model's chat template.", rich_help_panel=_INPUT
        ),
    ] = False,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What the chat template takes, such as enable_thinking=false: JSON, or else a "
            "string; may be repeated.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    max_tokens: options.MaxTokens = 256,
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
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    draft_lora: options.DraftLora = None,
    kv_budget: options.KvBudget = None,
    show_blocks: Annotated[
        bool,
        typer.Option(
            "--show-blocks",
            help="Show each block filling in (on a terminal).",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    keep_blocks: Annotated[
        bool,
        typer.Option(
            "--keep-blocks",
            help="The same, a line for each forward that stays on the screen.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    delay: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Show each forward's block so long.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output.", rich_help_panel=_OUTPUT),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="With --json: what each forward decided, with entropy and probability.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --json: each token's log-probability, and the N best in its place.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    debug: options.Debug = False,
    **decoding: Any,
) -> int:
    """Generate text from a prompt.

    The text is written as it becomes final; figures follow on standard error.
    """
    from ..engine import Engine

    show_blocks = show_blocks or keep_blocks
    _check_output(show_blocks, delay, json, trace, logprobs)
    if template_arg and not chat:
        raise SbdValueError("--template-arg has no effect without --chat: give both")
    arguments = dict(map(template_argument, template_arg or ()))
    text = read_prompt(prompt, file, escape, chomp)
    stops = [unescaped(each, "--stop") if escape else each for each in stop or ()]
    if escape and prompt in (None, "-") and not stops:
        raise SbdValueError("--escape has no effect without --prompt TEXT or --stop: leave it out")
    model = options.one_model(model, model_flag)
    budget = options.in_bytes(kv_budget)
    with Engine(model, device, threads, n_ctx, kv_dtype, draft_lora, budget) as engine:
        asked = {
            "max_tokens": max_tokens,
            "decoder": decoder,
            **decoding,
            **options.given(context, options.SAMPLING_NAMES),
            **options.given(context, options.RULE_NAMES),
            "logit_bias": _biases(logit_bias or ()),
            "seed": secrets.randbits(32) if seed is None and temperature > 0 else seed,
            "stop": stops,
            "ignore_eos": ignore_eos,
        }
        messages = [{"role": "user", "content": text}]
        stream = engine.stream(
            engine.tokenizer.encode_chat(messages, fits=engine.n_ctx, **arguments)
            if chat
            else text,
            **asked,
        )
        if seed is not None and temperature == 0:
            options.note("--seed has no effect at temperature 0: the most probable token is taken")
        if draft_lora is not None:
            options.check_drafts(engine, decoder)
        if decoder == "auto" and engine.auto_decoder == "ntp":
            options.note("this model does not say that it can decode blocks: decoding with ntp")
        if show_blocks and not sys.stdout.isatty():
            show_blocks = False
            options.note("--show-blocks needs a terminal: writing plain text")
        interrupted = False
        chunks: list[Chunk] = []
        with stream:
            try:
                if show_blocks:
                    from .blocks import show

                    in_force = engine.resolve(**asked)
                    # Without a block size the new text is one block.
                    size = in_force.get("block_size", 1) or max_tokens
                    show(engine, stream, size, delay or 0.0, keep_blocks)
                else:
                    _write(_kept(stream, chunks) if trace else stream, stream, quiet=json)
            except KeyboardInterrupt:
                interrupted = True
        completion = stream.completion
        if json:
            report = _report(completion, engine.resolve(**asked))
            report["logprobs"] = _scored(engine, completion)
            if trace:
                report["trace"] = [_traced(engine, chunk) for chunk in chunks]
            print_json(report)
    if not json:
        _print_figures(completion, asked["seed"] if temperature > 0 else None)
    return 130 if interrupted else 0


def _check_output(
    show_blocks: bool, delay: float | None, json: bool, trace: bool, logprobs: int | None
) -> None:
    if show_blocks and json:
        raise SbdValueError("expected --show-blocks or --json, got both")
    if trace and not json:
        raise SbdValueError("--trace has no effect without --json: give both")
    if logprobs is not None and not json:
        raise SbdValueError("--logprobs has no effect without --json: give both")
    if delay is not None:
        if not show_blocks:
            raise SbdValueError("--delay has no effect without --show-blocks or --keep-blocks")
        if not 0 <= delay < math.inf:  # NaN too
            raise SbdValueError(f"expected --delay as seconds >= 0, got {delay:g}")


def _biases(texts: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise SbdValueError(
                f"expected --logit-bias TOKEN=BIAS, such as 42=-100, got {text!r}"
            ) from None
        if number in biases:
            raise SbdValueError(f"--logit-bias names token {number} twice: give it once")
        biases[number] = value
    return biases


def _kept(stream: Stream, chunks: list[Chunk]) -> Iterator[Chunk]:
    for chunk in stream:
        chunks.append(chunk)
        yield chunk


def _report(completion: Completion, in_force: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints: the completion and what it was made with. Greedy text has no seed."""
    decoder, seed = in_force.pop("decoder"), in_force.pop("seed", None)
    in_force.pop("sample_index", None)  # a command makes one
    return {**completion.as_dict(), "decoder": decoder, "options": in_force, "seed": seed}


def _traced(engine: Engine, chunk: Chunk) -> dict[str, Any]:
    """A forward in `--trace`: what it decided, and what became final."""
    revealed = [
        {**reveal._asdict(), "text": engine.tokenizer.piece(reveal.token)}
        for reveal in chunk.revealed
    ]
    return {"revealed": revealed, "tokens": chunk.tokens, "text": chunk.text}


def _scored(engine: Engine, completion: Completion) -> list[dict[str, Any]] | None:
    """`--logprobs`: of each token, with its text."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": engine.tokenizer.piece(token), "logprob": logprob}

    if completion.logprobs is None:
        return None
    return [
        {**one(token, logprob), "best": [one(*each) for each in best]}
        for token, logprob, best in completion.logprobs
    ]


def _write(chunks: Iterator[Chunk], stream: Stream, quiet: bool) -> None:
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


def _print_figures(completion: Completion, seed: int | None) -> None:
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
    if seed is not None:
        line += f", seed {seed}"
    Console(stderr=True).print(line, style="dim", soft_wrap=True)
