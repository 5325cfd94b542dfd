"""The fields of requests: one table for each endpoint says which there are and what they may be.

What is null is as good as absent. What is not in the table, or in it with a value that asks for
something that is not there, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..errors import SbdError, SbdValueError
from ..json_values import parse_strict_json
from ..parameters import CHECKS, MAX_BEST, named, unknown
from ..text_file import decode_utf8
from . import checks, tools
from .checks import Check, Json
from .constraints import CONSTRAINT_FIELDS, Given
from .errors import ApiError, refused
from .tools import Tools

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
        raise ApiError(400, f"expected a body of one JSON object, got {checks.kind_of(body)}")
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


def _stop(name: str, value: Any) -> Any:
    if isinstance(value, list) and len(value) > MOST_STOPS:
        raise SbdValueError(f"expected at most {MOST_STOPS} {name} strings, got {len(value)}")
    if not isinstance(value, (str, list)):
        raise SbdValueError(
            f"expected {name} as a string or an array of them, got {checks.kind_of(value)}"
        )
    return CHECKS["stop"](name, value)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    biases = {}
    for key, bias in checks.object_(name, value).items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise SbdValueError(f"expected token ids as keys of {name}, got {key[:100]!r}")
        biases[int(key)] = bias
    return dict(CHECKS["logit_bias"](name, biases))


def _stream_options(name: str, value: Any) -> StreamOptions:
    given = checks.object_(name, value)
    checks.check_keys(name, given, [*StreamOptions.__dataclass_fields__])
    checked = {k: checks.boolean(f"{name}.{k}", v) for k, v in given.items() if v is not None}
    return StreamOptions(**checked)


def _template_arguments(name: str, value: Any) -> Json:
    arguments: Json = checks.object_(name, value)
    taken = _TEMPLATE_NAMES & arguments.keys()
    if taken:
        raise SbdValueError(f"{name} must not hold {', '.join(sorted(taken))}")
    return arguments


def _token_ids(name: str, value: list[Any]) -> list[int]:
    for position, token in enumerate(value):
        if type(token) is not int:
            raise SbdValueError(
                f"expected {name} as token ids, got {checks.kind_of(token)} at position {position}"
            )
    return value


def _prompts(name: str, value: Any) -> list[str | list[int]]:
    """A string, several, token ids, or several of those: as a list of prompts."""
    if isinstance(value, str):
        return [CHECKS["prompt"](name, value)]
    values = checks.array(name, value)
    if not values:
        raise SbdValueError(f"expected {name} with something in it, got an empty array")
    if not isinstance(values[0], (str, list)):
        return [_token_ids(name, values)]
    kind = type(values[0])
    for index, each in enumerate(values):
        if type(each) is not kind:
            raise SbdValueError(
                f"expected {name} as strings or as arrays of token ids, got "
                f"{checks.kind_of(each)} at position {index}"
            )
    return [CHECKS["prompt"](name, v) if kind is str else _token_ids(name, v) for v in values]


def _messages(name: str, value: Any) -> list[Json]:
    messages = checks.array(name, value)
    if not messages:
        raise SbdValueError(f"expected {name} with at least one message, got none")
    return [_message(f"{name.strip('`')}[{index}]", each) for index, each in enumerate(messages)]


def _message(where: str, value: Any) -> Json:
    if not isinstance(value, dict):
        raise ApiError(400, f"expected {where} as an object, got {checks.kind_of(value)}", where)
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
                known[key] = tools.tool_calls(at, each)
            elif key != "content":
                checks.text(at, each)
            else:
                known["content"] = each if isinstance(each, str) else _joined(at, each)
        except SbdError as error:
            raise ApiError(400, str(error), at) from None
    if not known.get("tool_calls", True):  # templates would write that there are some
        del known["tool_calls"]
    if "content" not in known and "tool_calls" not in known:
        raise ApiError(400, f"expected a content in {where}", f"{where}.content")
    if known["role"] == "developer":  # OpenAI's newer name
        known["role"] = "system"
    return known


def _joined(where: str, parts: Any) -> str:
    """A content in parts, of which only texts are known."""
    texts = []
    for index, part in enumerate(checks.array(where, parts)):
        kind = checks.object_(f"{where}[{index}]", part).get("type")
        if kind != "text":
            raise SbdValueError(
                f'expected {where}[{index}] of type "text", got {json.dumps(kind)[:100]}'
            )
        texts.append(checks.text(f"{where}[{index}].text", part.get("text")))
    return "".join(texts)


_ENGINE = (
    *("decoder", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"),
    "skip_special_tokens",
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *(option.name for option in _core.OPTIONS),
)
_SHARED: dict[str, Check] = {
    "model": checks.text,
    "max_tokens": CHECKS["max_tokens"],
    "n": checks.count(1, MOST_CHOICES),
    "stream": checks.boolean,
    "stream_options": _stream_options,
    "stop": _stop,
    "logit_bias": _logit_bias,
    **{name: CHECKS[name] for name in _ENGINE},
    "user": checks.text,
    **CONSTRAINT_FIELDS,
    "service_tier": checks.only("auto", "default"),
}
CHAT_FIELDS: dict[str, Check] = {
    **_SHARED,
    "messages": _messages,
    "max_completion_tokens": CHECKS["max_tokens"],
    "logprobs": checks.boolean,
    "top_logprobs": checks.count(0, MAX_BEST),
    "chat_template_kwargs": _template_arguments,
    "tools": tools.tools,
    "tool_choice": tools.tool_choice,
    "parallel_tool_calls": checks.boolean,
    "functions": checks.only([], instead="tools"),
    "function_call": checks.only("none", "auto", instead="tool_choice"),
    "store": checks.only(False),
    "metadata": checks.only({}),
    "modalities": checks.only(["text"]),
}
COMPLETION_FIELDS: dict[str, Check] = {
    **_SHARED,
    "prompt": _prompts,
    "max_tokens": checks.count(0, 2**31 - 1),
    "logprobs": CHECKS["logprobs"],
    "echo": checks.boolean,
    "best_of": checks.only(1),
    "suffix": checks.only(""),
}
TOKENIZE_FIELDS: dict[str, Check] = {
    "model": checks.text,
    "prompt": checks.text,
    "messages": _messages,
    "add_special_tokens": checks.boolean,
    "tools": tools.tools,
    "chat_template_kwargs": _template_arguments,
}
DETOKENIZE_FIELDS: dict[str, Check] = {
    "model": checks.text,
    "tokens": lambda name, value: _token_ids(name, checks.array(name, value)),
}


@dataclass(frozen=True)
class Asked:
    """What a request for text wants, whichever endpoint it came to.

    arguments: of Engine.generate, all but the prompt and max_tokens. constraint: what the
    text must be. best: log-probabilities in each
    token's place; None: none at all.
    """

    model: str | None
    prompts: list[str | list[int]]  # of completions
    messages: list[Json]  # of chat
    tools: Tools | None  # of chat
    template_arguments: Json
    max_tokens: int | None
    n: int
    stream: StreamOptions | None
    echo: bool
    arguments: Json
    constraint: Given | None

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
    constraints = [name for name in CONSTRAINT_FIELDS if values.get(name)]
    if len(constraints) > 1:
        fields = " and ".join(map(named, constraints))
        raise ApiError(
            400, f"expected one field that says what the text is, got {fields}", constraints[1]
        )
    asked = tools.asked_tools(values)
    if asked and asked.functions and constraints:
        raise ApiError(
            400,
            f"expected one of {named(constraints[0])} and `tools`, got both: with `tool_choice` "
            '"none" a text is no call',
            constraints[0],
        )
    constraint = values[constraints[0]] if constraints else None
    if constraint:
        arguments[constraint.argument] = constraint.value
    return Asked(
        model=values.get("model"),
        prompts=values.get("prompt", []),
        messages=values.get("messages", []),
        tools=asked,
        template_arguments=values.get("chat_template_kwargs", {}),
        max_tokens=max_tokens,
        n=values.get("n", 1),
        stream=values.get("stream_options", StreamOptions()) if streamed else None,
        echo=values.get("echo", False),
        arguments=arguments,
        constraint=constraint,
    )
