"""`sbd-engine chat`: a conversation with a chat model."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdValueError
from . import generation, options
from .prompt import read_template, template_argument

if TYPE_CHECKING:
    from ..streams import Stream


@options.with_decoding
def chat(
    context: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told first.", rich_help_panel=generation.INPUT),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A Jinja template instead of the model's own.",
            rich_help_panel=generation.INPUT,
        ),
    ] = None,
    template_arg: generation.TemplateArg = None,
    max_tokens: options.MaxTokens = generation.CHAT_MAX_TOKENS,
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
    seed: generation.Seed = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    draft_lora: options.DraftLora = None,
    kv_budget: options.KvBudget = None,
    show_blocks: generation.ShowBlocks = False,
    keep_blocks: generation.KeepBlocks = False,
    delay: generation.Delay = None,
    debug: options.Debug = False,
    **decoding: Any,
) -> None:
    """Hold a conversation with a chat model.

    A line is a message. One that ends with a backslash goes on in the next
    line; three quotes begin and end one of several lines. Ctrl-C stops an
    answer and keeps the chat. What begins with / is a command: /help lists
    them. A turn computes only what is new in it.

    From a pipe, too, each line is a message or command; standard output gets
    the answers alone. `run --chat` takes all of a pipe as one message.
    """
    from ..engine import Engine
    from .chat_input import Piped, Typed
    from .chat_loop import COMMANDS, ChatLoop
    from .conversation import Conversation, State
    from .experiment import model_name

    show_blocks = show_blocks or keep_blocks
    seconds = generation.check_delay(delay, show_blocks)
    arguments = dict(map(template_argument, template_arg or ()))
    template = None if chat_template is None else read_template(chat_template)
    if template is not None and "chat_template" in arguments:
        raise SbdValueError(
            "expected --chat-template or --template-arg chat_template=NAME, got both"
        )
    model = options.one_model(model, model_flag)
    budget = options.in_bytes(kv_budget)
    # Ctrl-C stops an answer, this the chat.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    with Engine(model, device, threads, n_ctx, kv_dtype, draft_lora, budget) as engine:
        state = State(system or "", [], arguments, generation.asked(context))
        conversation = Conversation(engine, template, state)
        if draft_lora is not None:
            options.check_drafts(engine, decoder)
        generation.note_decoder(engine, decoder)
        blocks = generation.on_a_terminal(show_blocks)

        def show(stream: Stream, asked: dict[str, Any]) -> None:
            if blocks:
                generation.show_blocks(engine, stream, asked, seconds, keep_blocks)
            else:
                generation.write(stream, stream)

        typed, name = sys.stdin.isatty(), model_name(model)
        loop = ChatLoop(
            engine, conversation, name, show, patient=typed, figures=typed and sys.stdout.isatty()
        )
        if typed:
            decoder_used = conversation.in_force["decoder"]
            options.note(
                f"{name} on {engine.device}, decoder {decoder_used}; /help lists the commands"
            )
        loop.run(Typed([*COMMANDS]) if typed else Piped())
