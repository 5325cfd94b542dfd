"""Chat templates: which one a call means, and what it sees of the conversation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import SbdTypeError, SbdValueError, brief
from .parameters import check_utf8, named, unknown
from .template_process import TemplateProcess
from .text_file import read_text

Message = Mapping[str, Any]
# Names that a message's reasoning goes by: the first is what templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_KINDS = (("unknown", "unk"), ("padding", "pad"), ("seperator", "sep"))  # as GGUF spells them


def read_template(file: Path) -> str:
    """A file's, in place of a model's own. Raises SbdValueError and SbdFileError."""
    text = read_text(file)
    if "{" not in text:  # it would be the name of one
        raise SbdValueError(
            f"{named('chat_template')} {file}: expected a Jinja template, got none in it"
        )
    return text


class ChatTemplates:
    """The chat templates of a model file, by name; "default" is the one where none is named.

    special_tokens: what every template sees of the tokenizer, such as bos_token.
    """

    def __init__(self, metadata: Mapping[str, Any], special_tokens: Mapping[str, Any]) -> None:
        names = metadata.get("tokenizer.chat_templates", [])
        keys = {"default": "tokenizer.chat_template"}
        keys |= {str(name): f"tokenizer.chat_template.{name}" for name in names}
        self.templates = {
            name: str(metadata[key]) for name, key in keys.items() if metadata.get(key)
        }
        self._special_tokens = dict(special_tokens)
        self._process = TemplateProcess()

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        add_generation_prompt: bool,
        arguments: Mapping[str, Any],
    ) -> Conversation:
        """Checks the arguments of one rendering."""
        try:
            given = {
                "messages": [_message(message) for message in _several("messages", messages)],
                "tools": _dicts("tools", tools),
                "documents": _dicts("documents", documents),
                **{name: _plain(name, value) for name, value in arguments.items()},
            }
        except RecursionError:
            raise SbdValueError("expected a conversation that is not nested this deep") from None
        if not given["messages"]:
            raise SbdValueError("expected at least one message, got none")
        fixed = {**self._special_tokens, "add_generation_prompt": bool(add_generation_prompt)}
        template = self._choose(chat_template, tools is not None)
        return Conversation(self._process, template, fixed, given, time.time())

    def _choose(self, name: str | None, with_tools: bool) -> str:
        if not self.templates and name is None:
            raise SbdValueError(
                "this model file has no chat template: give the prompt as plain text"
            )
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name not in self.templates and "{" in name:  # a template itself
            check_utf8("chat_template", name)
            return name
        if name not in self.templates:
            raise SbdValueError(unknown("chat_template", name, sorted(self.templates)))
        return self.templates[name]


class Conversation:
    """One rendering: what the caller gave stands apart, so that it can be told from the rest."""

    def __init__(
        self,
        process: TemplateProcess,
        template: str,
        fixed: Mapping[str, Any],
        given: Mapping[str, Any],
        now: float,
    ) -> None:
        self._process, self._template = process, template
        self._fixed, self._given, self._now = fixed, given, now

    def text(self) -> str:
        """What the template makes of it."""
        return self._process.render(self._template, {**self._fixed, **self._given}, self._now)

    def changed(self, change: Callable[[str], str]) -> Conversation:
        """The same, at the same time, with every string that the caller gave put through
        `change`."""
        given = _mapped(self._given, change)
        return Conversation(self._process, self._template, self._fixed, given, self._now)


def named_tokens(
    metadata: Mapping[str, Any], token: Callable[[int], str | None], eos_token_id: int | None
) -> dict[str, Any]:
    """The tokenizer's special tokens by the names that templates know, from a file of another
    program by their ids."""
    named = metadata.get("tokenizer.huggingface.special_tokens_map")
    if named is not None:
        return _parsed_map(str(named))
    ids = {
        key: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for key in ("bos", "unknown", "padding", "seperator", "cls", "mask")
    }
    ids["eos"] = eos_token_id
    tokens = {
        dict(_KINDS).get(key, key): token(id_) for key, id_ in ids.items() if isinstance(id_, int)
    }
    return {f"{kind}_token": text for kind, text in tokens.items() if text is not None}


def _parsed_map(text: str) -> dict[str, Any]:
    try:
        named = json.loads(text)
        return {name: token for name, token in named.items() if isinstance(token, (str, list))}
    except (ValueError, RecursionError, AttributeError):
        raise SbdValueError(
            "tokenizer.huggingface.special_tokens_map: expected names and tokens as JSON, "
            f"got {brief(text)}"
        ) from None


def _plain(name: str, value: Any) -> Any:
    """`value` as what JSON has."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        check_utf8(name, value)
        return str.__str__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SbdTypeError(f"expected strings as keys in {name}, got {brief(key)}")
        return {str(key): _plain(name, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    raise SbdTypeError(f"expected what JSON has in {name}, got {type(value).__name__}")


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise SbdTypeError(
            f'expected messages such as {{"role": "user", "content": "..."}}, got {brief(message)}'
        )
    # Many templates would write a None as text; reasoning goes by several names.
    known = {key: each for key, each in _plain("messages", message).items() if each is not None}
    reasoning = next((known[name] for name in _REASONING if name in known), None)
    if reasoning is not None:
        known = {"thinking": reasoning, **known, "reasoning_content": reasoning}
    return known


def _several(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    raise SbdTypeError(f"expected {name} as a list, got {type(value).__name__}")


def _dicts(name: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    for each in _several(name, value):
        if not isinstance(each, Mapping):
            raise SbdTypeError(f"expected {name} as a list of dicts, got {brief(each)} in it")
    return [_plain(name, each) for each in value]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    return value
