"""`sbd-engine run`: text from a prompt, written as it becomes final."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdValueError
from . import generation, options
from .options import print_json
from .prompt import read_prompt, template_argument, unescaped

if TYPE_CHECKING:
    from ..completion import Chunk, Completion
    from ..engine import Engine
    from ..streams import Stream

_INPUT, _OUTPUT = generation.INPUT, generation.OUTPUT


@generation.with_flags(max_tokens=256)
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
    template_arg: generation.TemplateArg = None,
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
    **flags: Any,
) -> int:
    """Generate text from a prompt.

    The text is written as it becomes final; figures follow on standard error.
    """
    show_blocks = generation.wants_blocks(context)
    _check_output(show_blocks, json, trace, logprobs)
    if template_arg and not chat:
        raise SbdValueError("--template-arg has no effect without --chat: give both")
    arguments = dict(map(template_argument, template_arg or ()))
    text = read_prompt(prompt, file, escape, chomp)
    stops = [unescaped(each, "--stop") if escape else each for each in flags["stop"] or ()]
    if escape and prompt in (None, "-") and not stops:
        raise SbdValueError("--escape has no effect without --prompt TEXT or --stop: leave it out")
    with generation.engine(context) as engine:
        asked = {**generation.asked(context), "stop": stops}
        sampled = asked.get("temperature", 0) > 0
        if sampled and "seed" not in asked:
            asked["seed"] = generation.drawn_seed()
        messages = [{"role": "user", "content": text}]
        stream = engine.stream(
            engine.tokenizer.encode_chat(messages, fits=engine.n_ctx, **arguments)
            if chat
            else text,
            **asked,
        )
        if "seed" in asked and not sampled:
            options.note("--seed has no effect at temperature 0: the most probable token is taken")
        generation.check_engine(context, engine)
        blocks = generation.Blocks(context, engine)
        interrupted = False
        chunks: list[Chunk] = []
        with stream:
            try:
                if blocks.wanted:
                    blocks.show(stream, asked)
                else:
                    chosen = _kept(stream, chunks) if trace else stream
                    generation.write(chosen, stream, quiet=json)
            except KeyboardInterrupt:
                interrupted = True
        completion = stream.completion
        if not (chat or json or interrupted):
            _hint_chat(engine, text)
        if json:
            report = _report(completion, engine.resolve(**asked))
            report["logprobs"] = _scored(engine, completion)
            if trace:
                report["trace"] = [_traced(engine, chunk) for chunk in chunks]
            print_json(report)
    if not json:
        generation.print_figures(completion, asked["seed"] if sampled else None)
    return 130 if interrupted else 0


def _check_output(show_blocks: bool, json: bool, trace: bool, logprobs: int | None) -> None:
    if show_blocks and json:
        raise SbdValueError("expected --show-blocks or --json, got both")
    if trace and not json:
        raise SbdValueError("--trace has no effect without --json: give both")
    if logprobs is not None and not json:
        raise SbdValueError("--logprobs has no effect without --json: give both")


def _hint_chat(engine: Engine, text: str) -> None:
    """Of a chat model whose prompt is in no template, its own special tokens or another's."""
    tokenizer = engine.tokenizer
    if tokenizer.chat_templates and not any(tokenizer.special_tokens.find(text)):
        options.note(
            "this is a chat model: --chat puts the prompt into its template, `sbd-engine chat` "
            "holds a conversation"
        )


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
