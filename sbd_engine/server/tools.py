"""Fields that say which functions a model may call, OpenAI's, and calls in a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SbdError, SbdValueError
from ..json_values import parse_strict_json
from ..parameters import unknown
from ..schema_checks import check_constants, check_ends
from ..tools import Function
from . import checks
from .checks import Json
from .errors import ApiError

MOST_TOOLS = 128  # OpenAI's
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """given: as the chat template gets them. functions: those that may be called, with the field
    that each came in; none at all with a `tool_choice` of "none". required: one must be."""

    given: list[Json]
    functions: dict[str, Function]
    required: bool
    parallel: bool


def tools(name: str, value: Any) -> list[Json]:
    given = checks.array(name, value)
    if len(given) > MOST_TOOLS:
        raise SbdValueError(f"expected at most {MOST_TOOLS} {name}, got {len(given)}")
    seen: dict[str, str] = {}
    for index, each in enumerate(given):
        where = f"{name.strip('`')}[{index}]"
        its = _tool(where, each)
        if its in seen:
            raise ApiError(
                400,
                f"expected tools of different names, got {its} in {seen[its]} and {where}",
                f"{where}.function.name",
            )
        seen[its] = where
    return list(given)


def _tool(where: str, value: Any) -> str:
    """Its name."""
    function = _function(where, value, ("name", "description", "parameters", "strict"))
    at = f"{where}.function"
    its = _at(f"{at}.name", checks.text, function.get("name"))
    if not _NAME.fullmatch(its):
        raise ApiError(
            400,
            f"expected {at}.name of 1 to 64 letters, digits, _ and -, got {its[:100]!r}",
            f"{at}.name",
        )
    for key, check in (("description", checks.text), ("strict", checks.boolean)):
        if function.get(key) is not None:
            _at(f"{at}.{key}", check, function[key])
    if function.get("parameters") is not None:
        _check_parameters(f"{at}.parameters", function["parameters"])
    return str(its)


def _check_parameters(at: str, value: Any) -> None:
    schema = _at(at, checks.object_, value)
    if schema.get("type", "object") != "object":
        kind = json.dumps(schema["type"])[:100]
        raise ApiError(400, f'expected {at} of type "object", got {kind}', at)
    _at(at, check_constants, schema)
    _at(at, check_ends, schema)


def _function(where: str, value: Any, keys: tuple[str, ...]) -> Json:
    """What stands in {"type": "function", "function": {...}}."""
    given = _at(where, checks.object_, value)
    if given.get("type") != "function":
        kind = json.dumps(given.get("type"))[:100]
        raise ApiError(400, f'expected {where} of type "function", got {kind}', f"{where}.type")
    function: Json = _at(f"{where}.function", checks.object_, given.get("function"))
    _check_keys(where, given, ("type", "function"))
    _check_keys(f"{where}.function", function, keys)
    return function


def _check_keys(where: str, value: Json, known: tuple[str, ...]) -> None:
    for key, each in value.items():
        if key not in known and each is not None:
            raise ApiError(400, unknown("field", key[:100], known), f"{where}.{key[:100]}")


def _at(where: str, check: Callable[[str, Any], Any], value: Any) -> Any:
    try:
        return check(where, value)
    except SbdError as error:
        raise ApiError(400, str(error), where) from None


def tool_choice(name: str, value: Any) -> str | Json:
    """One of the words, or {"name": ...}."""
    if isinstance(value, str):
        if value not in _CHOICES:
            raise SbdValueError(unknown(name, value, _CHOICES))
        return value
    if not isinstance(value, dict):
        raise SbdValueError(
            f"expected {name} as {', '.join(_CHOICES)} or an object with a function, got "
            f"{checks.kind_of(value)}"
        )
    function = _function(name.strip("`"), value, ("name",))
    _at(f"{name.strip('`')}.function.name", checks.text, function.get("name"))
    return function


def asked_tools(values: Json) -> Tools | None:
    """What the fields come to together."""
    given, choice = values.get("tools") or [], values.get("tool_choice", "auto")
    if not given:
        if choice not in ("none", "auto"):
            raise ApiError(400, "`tool_choice` has no effect without `tools`", "tool_choice")
        return None
    functions = {}
    for index, each in enumerate(given):
        its = each["function"]
        parameters = its.get("parameters")
        schema = {"properties": {}} if parameters is None else parameters
        functions[f"tools[{index}].function"] = Function(its["name"], schema)
    if isinstance(choice, dict):
        names = [each.name for each in functions.values()]
        functions = {at: each for at, each in functions.items() if each.name == choice["name"]}
        if not functions:
            raise ApiError(
                400, unknown("function", choice["name"], names), "tool_choice.function.name"
            )
    return Tools(
        given,
        {} if choice == "none" else functions,
        required=choice not in ("none", "auto"),
        # A function that is named is called once.
        parallel=values.get("parallel_tool_calls", True) and not isinstance(choice, dict),
    )


def tool_calls(where: str, value: Any) -> list[Json]:
    """Those of a message, their arguments as objects: templates write them."""
    return [_tool_call(f"{where}[{i}]", each) for i, each in enumerate(checks.array(where, value))]


def _tool_call(where: str, value: Any) -> Json:
    call = _at(where, checks.object_, value)
    id_, bare = (
        call.get("id"),
        {key: each for key, each in call.items() if key not in ("id", "index")},
    )
    function = _function(where, bare, ("name", "arguments"))
    at = f"{where}.function"
    known: Json = {"type": "function", "function": {
        "name": _at(f"{at}.name", checks.text, function.get("name")),
        "arguments": _arguments(f"{at}.arguments", function.get("arguments")),
    }}  # fmt: skip
    return known if id_ is None else {"id": _at(f"{where}.id", checks.text, id_), **known}


def _arguments(at: str, value: Any) -> Json:
    if isinstance(value, str):
        try:
            value = parse_strict_json(value or "{}")
        except ValueError as error:
            raise ApiError(400, f"expected {at} as JSON: {error}", at) from None
    arguments: Json = _at(at, checks.object_, value)
    return arguments
