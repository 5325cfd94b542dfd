"""Fields that say what a text must be, OpenAI's and vLLM's: each becomes an argument of
Engine.generate, or none."""

from __future__ import annotations

import json
from typing import Any

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


def _response_format(name: str, value: Any) -> Json:
    kinds = ("text", "json_object", "json_schema")
    kind = checks.object_(name, value).get("type")
    if kind not in kinds:
        raise SbdValueError(
            f"expected {name} of type {', '.join(kinds)}, got {json.dumps(kind)[:100]}"
        )
    checks.check_keys(name, value, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": _ANY_OBJECT}
    inner = f"{name}.json_schema"
    described = checks.object_(inner, value.get("json_schema"))
    checks.check_keys(inner, described, ("name", "description", "schema", "strict"))
    schema = described.get("schema")
    return {"json_schema": _ANY_OBJECT if schema is None else schema}


def _structured_outputs(name: str, value: Any) -> Json:
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
        return {"json_schema": _ANY_OBJECT}
    return {_STRUCTURED[key]: inner}


def _given(argument: str) -> Check:
    return lambda _, value: {argument: value}


CONSTRAINT_FIELDS: dict[str, Check] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **{f"guided_{key}": _given(argument) for key, argument in _STRUCTURED.items()},
}
