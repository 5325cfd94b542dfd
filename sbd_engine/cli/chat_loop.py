"""A chat as it goes: messages are answered, commands carried out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SbdDeviceError, SbdError, SbdValueError
from ..parameters import unknown, without_other_constraint
from . import generation, options
from .conversation import Conversation, State
from .option_values import option_value
from .options import one_line, terminal_safe

if TYPE_CHECKING:
    from ..completion import Completion
    from ..engine import Engine
    from ..streams import Stream
    from .chat_input import Input, Said

Show = Callable[["Stream", dict[str, Any]], None]
_LEAST_BESIDE = 60  # columns that a command and what it does take on one line


class ChatLoop:
    """model: its name, for people. show: writes an answer, made with these options.

    patient: who types is told of an error and goes on; a pipe's chat ends with it. figures: follow
    every answer.
    """

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        model: str,
        show: Show,
        patient: bool,
        figures: bool,
    ) -> None:
        self._engine, self._chat, self._model = engine, conversation, model
        self._show, self._patient, self._figures = show, patient, figures
        self._again = 0  # times that the last message has been answered anew
        self._ended = False

    def run(self, source: Input) -> None:
        while not self._ended:
            try:
                said = source.next()
                if said is None:
                    return
            except SbdError as error:
                self._tell(error)
                continue
            try:
                self._do(said)
            except KeyboardInterrupt:
                if not self._patient:
                    raise
                print(file=sys.stderr)
            except SbdError as error:
                self._tell(error)

    def _tell(self, error: SbdError) -> None:
        if isinstance(error, SbdDeviceError):  # all is lost
            raise error
        said = re.sub(r"`(\w+)`", r"\1", str(error))  # options are no flags here
        if not self._patient:
            raise SbdValueError(said) from error
        print("error:", one_line(said), file=sys.stderr)

    def _do(self, said: Said) -> None:
        if said.quoted or not said.text.startswith("/"):
            self._again = 0
            self._answer(said.text)
            return
        name, *rest = said.text.split(None, 1)
        name = _ALIASES.get(name, name)
        if name not in COMMANDS:
            hint = 'a message that begins with / is written in """'
            raise SbdValueError(f"{unknown('command', name, [*COMMANDS])}; {hint}")
        command = COMMANDS[name]
        text = rest[0] if rest else ""
        if text and not command.argument:
            raise SbdValueError(f"{name} takes nothing, got {text!r}")
        if not text and command.argument and not command.optional:
            raise SbdValueError(f"expected {name} {command.argument}, got {name} alone")
        command.call(self, text)

    def _answer(self, text: str) -> bool:
        """Whether there is one, as far as it may have come."""
        prompt = self._chat.prompt(text)
        asked = self._chat.options
        seed = None
        if asked.get("temperature", 0) > 0:
            if asked.get("seed") is None:
                asked["seed"] = generation.drawn_seed()
            else:
                asked["sample_index"] = self._again
            seed = asked["seed"]
        interrupted = False
        with self._engine.stream(prompt, **asked) as stream:
            try:
                self._show(stream, asked)
            except KeyboardInterrupt:
                if not self._patient:
                    raise
                interrupted = True
        done = stream.completion
        if interrupted and not done.text:
            options.note("stopped before there was an answer: your message is forgotten")
            return False
        self._chat.add(text, done.text)
        if self._figures:
            generation.print_figures(done, seed)
        self._note_length(done, asked["max_tokens"])
        if self._figures:
            _say("")
        return True

    def _note_length(self, done: Completion, max_tokens: int) -> None:
        if done.finish_reason != "length":
            return
        if len(done.tokens) >= max_tokens:
            if "max_tokens" not in self._chat.state.options:  # nobody asked for it
                options.note(f"the answer was cut off at max_tokens {max_tokens}")
        else:
            options.note(
                f"the context is full, the answer was cut off: {done.stats.prompt_tokens} tokens "
                f"and {len(done.tokens)} of the answer, and the context has {self._engine.n_ctx}: "
                "/clear forgets what was said"
            )

    # ---- commands ----

    def help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            _print_beside(f"{name} {command.argument}".rstrip(), command.help)
        _print_beside('"""', "Begins and ends a message of several lines.")
        _print_beside("\\", "At the end of a line: the message goes on in the next.")
        _print_beside("Ctrl-C", "Stops an answer. What there is of it stays.")

    def clear(self, _: str) -> None:
        self._chat.change(self._chat.state._replace(turns=[]))
        options.note("what was said is forgotten; system prompt and options stay")

    def regenerate(self, _: str) -> None:
        before, again = self._chat.state, self._again
        text = self._chat.take_back()
        if not self._chat.options.get("temperature"):
            options.note("at temperature 0 the same options give the same answer")
        self._again += 1
        answered = False
        try:
            answered = self._answer(text)
        finally:
            if not answered:
                self._chat.state, self._again = before, again

    def system(self, text: str) -> None:
        self._chat.change(self._chat.state._replace(system=text))
        options.note("the system prompt is set" if text else "there is no system prompt")

    def save(self, text: str) -> None:
        self._chat.save(Path(text).expanduser(), self._model)
        options.note(f"{_turns(self._chat.state)} saved to {text}")

    def load(self, text: str) -> None:
        self._chat.load(Path(text).expanduser())
        self._again = 0
        options.note(f"{_turns(self._chat.state)} loaded from {text}")

    def set(self, text: str) -> None:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise SbdValueError(f"expected /set NAME=VALUE, such as gamma=0.1, got {text!r}")
        name = name.replace("-", "_")
        own = {name: option_value(name, value)} if value else {}
        changed = {**without_other_constraint(self._chat.state.options, own), **own}
        if not value:
            changed.pop(name, None)
        before = self._chat.in_force
        self._chat.change(self._chat.state._replace(options=changed))
        after = self._chat.in_force
        for each in [*after, *(gone for gone in before if gone not in after)]:
            if before.get(each) != after.get(each):
                _say(f"{each}: {_shown(before.get(each))} -> {_shown(after.get(each))}")

    def show(self, _: str) -> None:
        state, in_force = self._chat.state, self._chat.in_force
        device, n_ctx = self._engine.device, self._engine.n_ctx
        _say(f"{self._model} on {device}, context {n_ctx}")
        _say(", ".join(f"{name} {_shown(value)}" for name, value in in_force.items()))
        if state.template_arguments:
            _say(f"template: {_shown(dict(state.template_arguments))}")
        _say(f"system: {state.system}" if state.system else "no system prompt")
        _say(_turns(state))

    def quit(self, _: str) -> None:
        self._ended = True


class Command(NamedTuple):
    """argument: what follows it; "" where nothing does."""

    argument: str
    help: str
    call: Callable[[ChatLoop, str], None]
    optional: bool = False


COMMANDS = {
    "/help": Command("", "This list.", ChatLoop.help),
    "/clear": Command("", "Forget what was said.", ChatLoop.clear),
    "/regenerate": Command("", "Answer the last message anew.", ChatLoop.regenerate),
    "/system": Command(
        "TEXT", "What the model is told first; alone: nothing.", ChatLoop.system, True
    ),
    "/save": Command("FILE", "Write messages and options to a file.", ChatLoop.save),
    "/load": Command("FILE", "Go on with those of a file.", ChatLoop.load),
    "/set": Command(
        "NAME=VALUE", "Change an option, such as gamma=0.1; NAME= is the model's own.", ChatLoop.set
    ),
    "/show": Command("", "What is in force.", ChatLoop.show),
    "/quit": Command("", "End the chat, as Ctrl-D does.", ChatLoop.quit),
}
_ALIASES = {"/bye": "/quit", "/exit": "/quit", "/?": "/help"}  # as other chats have them


def _turns(state: State) -> str:
    count = len(state.turns) // 2
    return f"{count} turn{'s' if count != 1 else ''}"


def _shown(value: object) -> str:
    return (
        "none"
        if value in (None, [], {})
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _say(text: str) -> None:
    """Standard output has the answers alone."""
    print(terminal_safe(text), file=sys.stderr)


def _print_beside(name: str, text: str) -> None:
    columns = get_terminal_size().columns
    if columns < _LEAST_BESIDE:
        lines = [name, *(f"  {line}" for line in wrap(text, columns - 2))]
    else:
        first, *others = wrap(text, columns - 20)
        lines = [f"{name:18}{first}", *(" " * 18 + line for line in others)]
    _say("\n".join(lines))
