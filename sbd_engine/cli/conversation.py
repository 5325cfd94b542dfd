"""The state of a chat: what was said, by which template and options; saved to a file and read from
one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SbdError, SbdFileError, SbdLengthError, SbdValueError, brief
from ..json_values import finite, parse_json
from ..parameters import check_utf8, unknown
from ..replacing import replacing
from ..template_process import REQUEST_BYTES
from ..text_file import read_text
from .generation import CHAT_MAX_TOKENS
from .option_values import check_names, option_value
from .prompt import check_template_name

if TYPE_CHECKING:
    from ..engine import Engine

Message = dict[str, str]

_FORMAT = "sbd-engine chat 1"
_KEYS = ("format", "model", "template_arguments", "options", "messages")


class State(NamedTuple):
    """system: "" is none. turns: a user's message and its answer in turn. options: of
    Engine.generate, as given; the others are the model's."""

    system: str
    turns: list[Message]
    template_arguments: Mapping[str, Any]
    options: Mapping[str, Any]


class Conversation:
    """A chat with one engine. Whatever is refused leaves it as it was.

    template: instead of the model's own.
    """

    def __init__(self, engine: Engine, template: str | None, state: State) -> None:
        self._engine = engine
        self._template = template
        if template is None and not engine.tokenizer.chat_templates:
            raise SbdValueError(
                "this model file has no chat template: give one with --chat-template FILE, or "
                "complete texts with `sbd-engine run`"
            )
        self.state = state
        self.change(state)

    @property
    def options(self) -> dict[str, Any]:
        """Of the next answer, as they are asked for."""
        return {"max_tokens": CHAT_MAX_TOKENS, **self.state.options}

    @property
    def in_force(self) -> dict[str, Any]:
        """Of the next answer, the model's own among them, but for what is drawn."""
        resolved = self._engine.resolve(**self.options)
        seeded = self.state.options.get("seed") is not None
        drawn = ("sample_index",) if seeded else ("seed", "sample_index")
        return {name: value for name, value in resolved.items() if name not in drawn}

    def change(self, state: State) -> None:
        """Goes on with this one. Raises SbdError where it cannot."""
        check_names(state.options)
        self._engine.resolve(**{"max_tokens": CHAT_MAX_TOKENS, **state.options})
        self._encoded(state, "?")  # what a template refuses, it refuses now
        self.state = state

    def prompt(self, text: str) -> list[int]:
        """The tokens that the model is to answer, with this message of the user's at the end.
        Raises SbdValueError where the context has no room for them."""
        return self._encoded(self.state, text)

    def add(self, text: str, answer: str) -> None:
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.state = self.state._replace(turns=[*self.state.turns, *turn])

    def take_back(self) -> str:
        """Forgets the last turn; returns what the user had said."""
        if not self.state.turns:
            raise SbdValueError("/regenerate: nothing has been answered yet")
        *turns, question, _ = self.state.turns
        self.state = self.state._replace(turns=turns)
        return question["content"]

    def _encoded(self, state: State, text: str) -> list[int]:
        messages = [*_messages(state), {"role": "user", "content": text}]
        named = {} if self._template is None else {"chat_template": self._template}
        arguments = {**named, **state.template_arguments}
        most = self._engine.n_ctx - 1
        try:
            ids = self._engine.tokenizer.encode_chat(messages, fits=most, **arguments)
            if len(ids) <= most:
                return ids
            length = str(len(ids))
        except SbdLengthError:  # not encoded to its end
            length = f"more than {most}"
        raise SbdValueError(
            f"the context is full: this would be a conversation of {length} tokens, and the "
            f"context has {self._engine.n_ctx}: "
            + ("/clear forgets what was said" if state.turns else "shorten it")
        )

    def save(self, path: Path, model: str) -> None:
        """Raises SbdFileError; what is there and is no saved chat stays."""
        if path.exists() and not _is_saved(path):
            raise SbdFileError(f"{path}: is there and is no saved chat: give another name")
        values = (
            _FORMAT,
            model,
            self.state.template_arguments,
            self.state.options,
            _messages(self.state),
        )
        saved = finite(dict(zip(_KEYS, values, strict=True)))
        text = json.dumps(saved, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, "utf-8")

    def load(self, path: Path) -> None:
        """Raises SbdError, all naming the file; then nothing has changed."""
        state = read_state(path)
        try:
            self.change(state)
        except SbdError as error:
            raise SbdValueError(f"{path}: {error}") from None


def read_state(path: Path) -> State:
    """What `save` wrote, checked."""
    if path.exists() and not path.is_file():
        raise SbdFileError(f"{path}: expected a saved chat, got a folder, pipe or device")
    if path.exists() and path.stat().st_size > REQUEST_BYTES:
        raise SbdValueError(
            f"{path}: expected a saved chat of at most {REQUEST_BYTES} bytes, got "
            f"{path.stat().st_size}"
        )
    text = read_text(path)
    try:
        return _state(parse_json(text))
    except SbdError as error:
        raise SbdValueError(f"{path}: {error}") from None
    except ValueError as error:
        raise SbdValueError(f"{path}: expected a saved chat, got no JSON: {error}") from None


def _state(saved: Any) -> State:
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise SbdValueError(f'expected a saved chat, a JSON object with "format": "{_FORMAT}"')
    for key in _KEYS:
        if key not in saved:
            raise SbdValueError(f'expected "{key}" in a saved chat, got none')
    for key in saved:
        if key not in _KEYS:
            raise SbdValueError(unknown("key", key, _KEYS))
    arguments, options = (_object(saved, key) for key in ("template_arguments", "options"))
    for name in arguments:
        check_template_name(name)
    messages = _checked(saved["messages"])
    system = ""
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        if message["role"] != role:
            raise SbdValueError(
                "expected messages of user and assistant in turn, behind one of system at most, "
                f"got {message['role']!r} where {role!r} belongs"
            )
    if len(messages) % 2:
        raise SbdValueError("expected the assistant's message at the end, got the user's")
    return State(system, messages, arguments, {n: _option(n, v) for n, v in options.items()})


def _object(saved: dict[str, Any], key: str) -> dict[str, Any]:
    value = saved[key]
    if not isinstance(value, dict):
        raise SbdValueError(f'expected "{key}" as a JSON object, got {brief(value)}')
    return value


def _option(name: str, value: Any) -> Any:
    if isinstance(value, str):  # a number that JSON does not have among them
        return option_value(name, value)
    if name == "logit_bias" and isinstance(value, dict):  # whose keys are strings
        return option_value(name, ",".join(f"{token}={bias}" for token, bias in value.items()))
    return value


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise SbdValueError(f'expected "messages" as a list, got {brief(messages)}')
    for index, message in enumerate(messages):
        if not (
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and all(isinstance(each, str) for each in message.values())
        ):
            raise SbdValueError(
                f'expected messages such as {{"role": "user", "content": "..."}}, got '
                f"{brief(message)} as the {index + 1}."
            )
        check_utf8(f"the {index + 1}. message", message["content"])
    return messages


def _messages(state: State) -> Sequence[Message]:
    first = [{"role": "system", "content": state.system}] if state.system else []
    return [*first, *state.turns]


def _is_saved(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _FORMAT.encode() in file.read(64)
