"""Fields that say what a text must be, OpenAI's and vLLM's."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..errors import SbdValueError
from . import checks
from .checks import Check, Json

_ANY_OBJECT: Json = {"type": "object"}
# vLLM's names of constraints, and the engine's.
_STRUCTURED = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choices",
    "grammar": "grammar",
}


class Given(NamedTuple):
    """An argument of Engine.generate, and the field it came in, as errors name it."""

    argument: str
    value: Any
    field: str


def _response_format(name: str, value: Any) -> Given | None:
    kinds = ("text", "json_object", "json_schema")
    kind = checks.object_(name, value).get("type")
    if kind not in kinds:
        raise SbdValueError(
            f"expected {name} of type {', '.join(kinds)}, got {json.dumps(kind)[:100]}"
        )
    checks.check_keys(name, value, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return None
    if kind == "json_object":
        return Given("json_schema", _ANY_OBJECT, name)
    inner = f"{name}.json_schema"
    described = checks.object_(inner, value.get("json_schema"))
    for key, check in (
        ("name", checks.text),
        ("description", checks.text),
        ("strict", checks.boolean),
    ):
        if described.get(key) is not None:
            check(f"{inner}.{key}", described[key])
    schema = described.get("schema")
    return Given("json_schema", _ANY_OBJECT if schema is None else schema, f"{inner}.schema")


def _structured_outputs(name: str, value: Any) -> Given:
    """vLLM's."""
    given = {k: v for k, v in checks.object_(name, value).items() if v not in (None, False)}
    checks.check_keys(name, given, [*_STRUCTURED, "json_object"])
    if len(given) != 1:
        raise SbdValueError(
            f"expected {name} with one of {', '.join([*_STRUCTURED, 'json_object'])}, got "
            f"{' and '.join(given) or 'none'}"
        )
    ((key, inner),) = given.items()
    if key == "json_object":
        checks.boolean(f"{name}.{key}", inner)
        return Given("json_schema", _ANY_OBJECT, name)
    return Given(_STRUCTURED[key], inner, f"{name}.{key}")


def _given(argument: str) -> Check:
    return lambda name, value: Given(argument, value, name)


CONSTRAINT_FIELDS: dict[str, Check] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **{f"guided_{key}": _given(argument) for key, argument in _STRUCTURED.items()},
}
