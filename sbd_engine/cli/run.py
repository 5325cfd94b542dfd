"""`sbd-engine run`: text from a prompt, written as it becomes final."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdValueError
from ..text_file import decode_utf8, read_text
from . import options
from .options import print_json, terminal_safe

if TYPE_CHECKING:
    from ..completion import Completion
    from ..streams import Stream

_INPUT, _OUTPUT = "Prompt", "Output"


def run(
    context: typer.Context,
    model: options.Model = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="The prompt; - reads standard input.", rich_help_panel=_INPUT
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file with the prompt.", rich_help_panel=_INPUT),
    ] = None,
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
    block_size: options.BlockSize = None,
    unmask: options.Unmask = None,
    gamma: options.Gamma = None,
    proxy: options.Proxy = None,
    factor: options.Factor = None,
    confidence_threshold: options.ConfidenceThreshold = None,
    top_n: options.TopN = None,
    steps: options.Steps = None,
    horizon: options.Horizon = None,
    block_add_threshold: options.BlockAddThreshold = None,
    decoded_token_threshold: options.DecodedTokenThreshold = None,
    skip_threshold: options.SkipThreshold = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    draft_lora: options.DraftLora = None,
    show_blocks: Annotated[
        bool,
        typer.Option(
            "--show-blocks",
            help="Show each block filling in (on a terminal).",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object on standard output.", rich_help_panel=_OUTPUT),
    ] = False,
    debug: options.Debug = False,
) -> int:
    """Generate text from a prompt.

    The text is written as it becomes final; figures follow on standard error.
    """
    from ..engine import Engine

    if show_blocks and json:
        raise SbdValueError("expected --show-blocks or --json, got both")
    if template_arg and not chat:
        raise SbdValueError("expected --template-arg together with --chat")
    arguments = dict(map(_template_argument, template_arg or ()))
    text = _read_prompt(prompt, file)
    with Engine(model, device, threads, n_ctx, kv_dtype, draft_lora) as engine:
        messages = [{"role": "user", "content": text}]
        stream = engine.stream(
            engine.tokenizer.encode_chat(messages, **arguments) if chat else text,
            max_tokens=max_tokens,
            decoder=decoder,
            **options.given(context, options.DECODING_NAMES),
            **options.given(context, options.SAMPLING_NAMES),
            stop=stop or (),
            ignore_eos=ignore_eos,
        )
        if decoder == "auto" and engine.auto_decoder == "ntp":
            options.note("this model does not say that it can decode blocks: decoding with ntp")
        if show_blocks and not sys.stdout.isatty():
            show_blocks = False
            options.note("--show-blocks needs a terminal: writing plain text")
        interrupted = False
        with stream:
            try:
                if show_blocks:
                    from .blocks import show

                    # Without a block size the new text is one block.
                    in_blocks = block_size or engine.defaults["block_size"] or max_tokens
                    name = engine.auto_decoder if decoder == "auto" else decoder
                    show(engine, stream, 1 if name in ("ntp", "dmtd") else in_blocks)
                else:
                    _write(stream, quiet=json)
            except KeyboardInterrupt:
                interrupted = True
        completion = stream.completion
    if json:
        print_json(completion.as_dict())
    else:
        _print_figures(completion)
    return 130 if interrupted else 0


def _write(stream: Stream, quiet: bool) -> None:
    """Writes each chunk at once; after an interruption, all that was committed, and a line end."""
    shown: Callable[[str], str] = terminal_safe if sys.stdout.isatty() else str
    written = 0
    try:
        for chunk in stream:
            if chunk.text and not quiet:
                sys.stdout.write(shown(chunk.text))
                sys.stdout.flush()
                written += len(chunk.text)
    finally:
        if not quiet:
            stream.close()
            print(shown(stream.completion.text[written:]), flush=True)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise SbdValueError("expected the prompt from --prompt or --file, got both")
    if file is not None:
        return read_text(file)
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return decode_utf8(sys.stdin.buffer.read(), "standard input")
    if prompt is None:
        raise SbdValueError("expected a prompt: give --prompt TEXT, --file FILE, or pipe it in")
    return prompt


def _template_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name == "messages":
        raise SbdValueError(
            f"expected --template-arg NAME=VALUE, such as enable_thinking=false, got {text!r}"
        )
    try:
        return name, json_module.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _print_figures(completion: Completion) -> None:
    from rich.console import Console

    stats = completion.stats
    count = len(completion.tokens)
    line = (
        f"{count} token{'s' if count != 1 else ''}, "
        f"{stats.nfe} forward{'s' if stats.nfe != 1 else ''} (NFE), "
        f"{stats.tokens_per_forward:.2f} tokens per forward, {stats.decode_tok_s:.1f} tok/s, "
        f"first token after {stats.ttft_ms:.0f} ms"
    )
    if stats.accepted_length is not None:
        line += f", {stats.accepted_length:.1f} tokens accepted of a block"
    if stats.thinking_forwards is not None:
        line += f", {stats.thinking_forwards} forwards through the thinking layers"
    Console(stderr=True, highlight=False).print(line, style="dim", soft_wrap=True)
