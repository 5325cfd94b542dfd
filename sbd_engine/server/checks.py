"""What a field's value may be, in JSON's words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SbdValueError
from ..parameters import check_utf8, integer, unknown

Json = dict[str, Any]
Check = Callable[[str, Any], Any]


def kind_of(value: Any) -> str:
    """In JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return kinds.get(type(value), "a number")


def _instance(kind: type) -> Check:
    example = {bool: "true or false", str: "a string", list: "an array", dict: "an object"}[kind]

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise SbdValueError(f"expected {name} as {example}, got {kind_of(value)}")
        if isinstance(value, str):
            check_utf8(name, value)
        return value

    return check


boolean, text, array, object_ = map(_instance, (bool, str, list, dict))


def count(low: int, high: int) -> Check:
    return lambda name, value: integer(name, value, low, high)


def only(*accepted: Any, instead: str = "") -> Check:
    """A field of OpenAI's of which only what asks for nothing is there. instead: its newer name."""
    shown = " or ".join(json.dumps(value) for value in accepted)
    shown += f"; use `{instead}`" if instead else ""

    def check(name: str, value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in accepted):
            raise SbdValueError(f"{name} is not supported here: leave it out, or give {shown}")
        return value

    return check


def check_keys(name: str, value: Json, known: Sequence[str]) -> None:
    for key in value:
        if key not in known:
            raise SbdValueError(f"{unknown('field', key[:100], known)} ({name})")
