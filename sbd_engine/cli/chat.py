"""`sbd-engine chat`: a conversation with a chat model."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..chat import read_template
from ..errors import SbdValueError
from . import generation, options
from .prompt import template_argument

if TYPE_CHECKING:
    from ..streams import Stream


@generation.with_flags(generation.CHAT_MAX_TOKENS)
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
    debug: options.Debug = False,
    **flags: Any,
) -> None:
    """Hold a conversation with a chat model.

    A line is a message. One that ends with a backslash goes on in the next
    line; three quotes begin and end one of several lines. Ctrl-C stops an
    answer and keeps the chat. What begins with / is a command: /help lists
    them. A turn computes only what is new in it.

    From a pipe, too, each line is a message or command; standard output gets
    the answers alone. `run --chat` takes all of a pipe as one message.
    """
    from .chat_input import Piped, Typed
    from .chat_loop import COMMANDS, ChatLoop
    from .conversation import Conversation, State
    from .experiment import model_name

    generation.wants_blocks(context)
    arguments = dict(map(template_argument, template_arg or ()))
    template = None if chat_template is None else read_template(chat_template)
    if template is not None and "chat_template" in arguments:
        raise SbdValueError(
            "expected --chat-template or --template-arg chat_template=NAME, got both"
        )
    # Ctrl-C stops an answer, this the chat.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    with generation.engine(context) as engine:
        state = State(system or "", [], arguments, generation.asked(context))
        conversation = Conversation(engine, template, state)
        generation.check_engine(context, engine)
        blocks = generation.Blocks(context, engine)

        def show(stream: Stream, asked: dict[str, Any]) -> None:
            if blocks.wanted:
                blocks.show(stream, asked)
            else:
                generation.write(stream, stream)

        typed, name = sys.stdin.isatty(), model_name(options.one_model(model, model_flag))
        loop = ChatLoop(
            engine, conversation, name, show, patient=typed, figures=typed and sys.stdout.isatty()
        )
        if typed:
            decoder = conversation.in_force["decoder"]
            options.note(f"{name} on {engine.device}, decoder {decoder}; /help lists the commands")
        loop.run(Typed([*COMMANDS]) if typed else Piped())
