"""The fields of requests: one table for each endpoint says which there are and what they may be.

What is null is as good as absent. What is not in the table, or in it with a value that asks for
something that is not there, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..errors import SbdError, SbdValueError
from ..json_values import parse_strict_json
from ..parameters import CHECKS, MAX_BEST, check_utf8, integer, named, unknown
from ..text_file import decode_utf8
from .errors import ApiError, refused

Json = dict[str, Any]
Check = Callable[[str, Any], Any]

MOST_CHOICES = 128  # texts of one request
MOST_STOPS = 16
_MESSAGE_KEYS = {
    *("role", "content", "name", "reasoning_content", "reasoning", "thinking"),
    *("tool_calls", "tool_call_id"),
}
# Of Tokenizer.encode_chat: what a template argument must not stand in for.
_TEMPLATE_NAMES = {
    *("messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("sanitize_control_tokens", "fits"),
}


@dataclass(frozen=True)
class StreamOptions:
    include_usage: bool = False
    sbd_blocks: bool = False


def parse_body(data: bytes) -> Json:
    """A request's body: one JSON object."""
    try:
        body = parse_strict_json(decode_utf8(data, "the body"))
    except SbdValueError as error:
        raise ApiError(400, str(error)) from None
    except ValueError as error:
        raise ApiError(400, f"expected a body of JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a body of one JSON object, got {_kind(body)}")
    return body


def read(body: Json, fields: Mapping[str, Check]) -> Json:
    """The fields that are there, checked."""
    values: Json = {}
    for name, value in body.items():
        if name not in fields:
            raise ApiError(400, unknown("field", name[:100], [*fields]), name[:100])
        if value is None:
            continue
        try:
            values[name] = fields[name](named(name), value)
        except SbdError as error:
            raise refused(error, name) from None
        except RecursionError:
            raise ApiError(
                400, f"expected {named(name)} that is not nested this deep", name
            ) from None
    return values


def _kind(value: Any) -> str:
    """In JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number")


def _instance(kind: type) -> Check:
    example = {bool: "true or false", str: "a string", list: "an array", dict: "an object"}[kind]

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise SbdValueError(f"expected {name} as {example}, got {_kind(value)}")
        if isinstance(value, str):
            check_utf8(name, value)
        return value

    return check


_boolean, _text, _array, _object = map(_instance, (bool, str, list, dict))


def _count(low: int, high: int) -> Check:
    return lambda name, value: integer(name, value, low, high)


def _only(*accepted: Any) -> Check:
    """A field of OpenAI's of which only what asks for nothing is there."""
    shown = " or ".join(json.dumps(value) for value in accepted)

    def check(name: str, value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in accepted):
            raise SbdValueError(f"{name} is not supported here: leave it out, or give {shown}")
        return value

    return check


def _stop(name: str, value: Any) -> Any:
    if isinstance(value, list) and len(value) > MOST_STOPS:
        raise SbdValueError(f"expected at most {MOST_STOPS} {name} strings, got {len(value)}")
    if not isinstance(value, (str, list)):
        raise SbdValueError(f"expected {name} as a string or an array of them, got {_kind(value)}")
    return CHECKS["stop"](name, value)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    biases = {}
    for key, bias in _object(name, value).items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise SbdValueError(f"expected token ids as keys of {name}, got {key[:100]!r}")
        biases[int(key)] = bias
    return dict(CHECKS["logit_bias"](name, biases))


def _stream_options(name: str, value: Any) -> StreamOptions:
    known = StreamOptions.__dataclass_fields__
    given = {}
    for key, each in _object(name, value).items():
        if key not in known:
            raise SbdValueError(f"{unknown('field', key[:100], [*known])} ({name})")
        if each is not None:
            given[key] = _boolean(f"{name}.{key}", each)
    return StreamOptions(**given)


def _template_arguments(name: str, value: Any) -> Json:
    arguments: Json = _object(name, value)
    taken = _TEMPLATE_NAMES & arguments.keys()
    if taken:
        raise SbdValueError(f"{name} must not hold {', '.join(sorted(taken))}")
    return arguments


def _token_ids(name: str, value: list[Any]) -> list[int]:
    for position, token in enumerate(value):
        if type(token) is not int:
            raise SbdValueError(
                f"expected {name} as token ids, got {_kind(token)} at position {position}"
            )
    return value


def _prompts(name: str, value: Any) -> list[str | list[int]]:
    """A string, several, token ids, or several of those: as a list of prompts."""
    if isinstance(value, str):
        return [CHECKS["prompt"](name, value)]
    values = _array(name, value)
    if not values:
        raise SbdValueError(f"expected {name} with something in it, got an empty array")
    if not isinstance(values[0], (str, list)):
        return [_token_ids(name, values)]
    kind = type(values[0])
    for index, each in enumerate(values):
        if type(each) is not kind:
            raise SbdValueError(
                f"expected {name} as strings or as arrays of token ids, got {_kind(each)} at "
                f"position {index}"
            )
    return [CHECKS["prompt"](name, v) if kind is str else _token_ids(name, v) for v in values]


def _messages(name: str, value: Any) -> list[Json]:
    messages = _array(name, value)
    if not messages:
        raise SbdValueError(f"expected {name} with at least one message, got none")
    return [_message(f"{name.strip('`')}[{index}]", each) for index, each in enumerate(messages)]


def _message(where: str, value: Any) -> Json:
    if not isinstance(value, dict):
        raise ApiError(400, f"expected {where} as an object, got {_kind(value)}", where)
    message: Json = value
    for key, each in message.items():
        if key not in _MESSAGE_KEYS and each:  # refusal, annotations, ... of an answer: empty
            raise ApiError(
                400, unknown("field", key[:100], sorted(_MESSAGE_KEYS)), f"{where}.{key[:100]}"
            )
    if message.get("role") is None:
        raise ApiError(400, f"expected a role in {where}", f"{where}.role")
    known = {
        key: each for key, each in message.items() if key in _MESSAGE_KEYS and each is not None
    }
    for key, each in known.items():
        at = f"{where}.{key}"
        try:
            if key == "tool_calls":
                _array(at, each)
            elif key != "content":
                _text(at, each)
            else:
                known["content"] = each if isinstance(each, str) else _joined(at, each)
        except SbdError as error:
            raise ApiError(400, str(error), at) from None
    if "content" not in known and "tool_calls" not in known:
        raise ApiError(400, f"expected a content in {where}", f"{where}.content")
    if known["role"] == "developer":  # OpenAI's newer name
        known["role"] = "system"
    return known


def _joined(where: str, parts: Any) -> str:
    """A content in parts, of which only texts are known."""
    texts = []
    for index, part in enumerate(_array(where, parts)):
        kind = _object(f"{where}[{index}]", part).get("type")
        if kind != "text":
            raise SbdValueError(
                f'expected {where}[{index}] of type "text", got {json.dumps(kind)[:100]}'
            )
        texts.append(_text(f"{where}[{index}].text", part.get("text")))
    return "".join(texts)


_ENGINE = (
    *("decoder", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *(option.name for option in _core.OPTIONS),
)
_SHARED: dict[str, Check] = {
    "model": _text,
    "max_tokens": CHECKS["max_tokens"],
    "n": _count(1, MOST_CHOICES),
    "stream": _boolean,
    "stream_options": _stream_options,
    "stop": _stop,
    "logit_bias": _logit_bias,
    **{name: CHECKS[name] for name in _ENGINE},
    "user": _text,
    "response_format": _only({"type": "text"}),
    "service_tier": _only("auto", "default"),
}
CHAT_FIELDS: dict[str, Check] = {
    **_SHARED,
    "messages": _messages,
    "max_completion_tokens": CHECKS["max_tokens"],
    "logprobs": _boolean,
    "top_logprobs": _count(0, MAX_BEST),
    "chat_template_kwargs": _template_arguments,
    "tools": _only([]),
    "tool_choice": _only("none", "auto"),
    "parallel_tool_calls": _only(True, False),
    "functions": _only([]),
    "function_call": _only("none", "auto"),
    "store": _only(False),
    "metadata": _only({}),
    "modalities": _only(["text"]),
}
COMPLETION_FIELDS: dict[str, Check] = {
    **_SHARED,
    "prompt": _prompts,
    "max_tokens": _count(0, 2**31 - 1),
    "logprobs": CHECKS["logprobs"],
    "echo": _boolean,
    "best_of": _only(1),
    "suffix": _only(""),
}
TOKENIZE_FIELDS: dict[str, Check] = {
    "model": _text,
    "prompt": _text,
    "messages": _messages,
    "add_special_tokens": _boolean,
    "chat_template_kwargs": _template_arguments,
}
DETOKENIZE_FIELDS: dict[str, Check] = {
    "model": _text,
    "tokens": lambda name, value: _token_ids(name, _array(name, value)),
}


@dataclass(frozen=True)
class Asked:
    """What a request for text wants, whichever endpoint it came to.

    arguments: of Engine.generate, all but the prompt and max_tokens. seeds: by choice is the
    sample_index. best: log-probabilities in each token's place; None: none at all.
    """

    model: str | None
    prompts: list[str | list[int]]  # of completions
    messages: list[Json]  # of chat
    template_arguments: Json
    max_tokens: int | None
    n: int
    stream: StreamOptions | None
    echo: bool
    arguments: Json

    @property
    def n_texts(self) -> int:
        return max(1, len(self.prompts)) * self.n

    @property
    def best(self) -> int | None:
        best: int | None = self.arguments.get("logprobs")
        return best

    @property
    def seed(self) -> int:
        seed: int = self.arguments["seed"]
        return seed


def asked_of_chat(body: Json, seed: int) -> Asked:
    """seed: where none is given."""
    values = read(body, CHAT_FIELDS)
    _need(values, "messages")
    limits = {values[n] for n in ("max_tokens", "max_completion_tokens") if n in values}
    if len(limits) > 1:
        raise ApiError(
            400,
            "expected one limit, got `max_completion_tokens` and another `max_tokens`",
            "max_completion_tokens",
        )
    best = values.get("top_logprobs")
    if best is not None and not values.get("logprobs"):
        raise ApiError(400, "`top_logprobs` has no effect without `logprobs`", "top_logprobs")
    wanted = (best or 0) if values.get("logprobs") else None
    return _asked(values, seed, next(iter(limits), None), wanted)


def asked_of_completion(body: Json, seed: int) -> Asked:
    values = read(body, COMPLETION_FIELDS)
    _need(values, "prompt")
    n, prompts = values.get("n", 1), values["prompt"]
    if n * len(prompts) > MOST_CHOICES:
        raise ApiError(
            400,
            f"expected at most {MOST_CHOICES} texts of one request, got {n} for each of "
            f"{len(prompts)} prompts",
            "prompt" if n == 1 else "n",
        )
    if values.get("max_tokens") == 0 and not values.get("echo"):
        raise ApiError(400, "expected `max_tokens` >= 1 without `echo`, got 0", "max_tokens")
    return _asked(values, seed, values.get("max_tokens", 16), values.get("logprobs"))


def _need(values: Json, name: str) -> None:
    if name not in values:
        raise ApiError(400, f"expected a field {named(name)}, got none", name)


def _asked(values: Json, seed: int, max_tokens: int | None, best: int | None) -> Asked:
    streamed = values.get("stream", False)
    if "stream_options" in values and not streamed:
        raise ApiError(
            400, "`stream_options` has no effect without `stream`: leave it out", "stream_options"
        )
    arguments = {name: values[name] for name in (*_ENGINE, "stop", "logit_bias") if name in values}
    arguments.setdefault("temperature", 1.0)  # OpenAI's
    arguments.setdefault("seed", seed)
    if arguments["temperature"] == 0:  # clients send them along: the most probable token is theirs
        arguments = {k: v for k, v in arguments.items() if k not in ("top_p", "top_k", "min_p")}
    if best is not None:
        arguments["logprobs"] = best
    return Asked(
        model=values.get("model"),
        prompts=values.get("prompt", []),
        messages=values.get("messages", []),
        template_arguments=values.get("chat_template_kwargs", {}),
        max_tokens=max_tokens,
        n=values.get("n", 1),
        stream=values.get("stream_options", StreamOptions()) if streamed else None,
        echo=values.get("echo", False),
        arguments=arguments,
    )
