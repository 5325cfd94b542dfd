"""Whether texts can end: none does of a part that needs another of its kind in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

_SCALARS = {"string", "number", "integer", "boolean", "null"}
_MOST_ROUNDS = 100
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "dependentSchemas")
_NO_SCHEMAS = ("const", "enum", "default", "examples", "$defs", "definitions")
_INDEX = re.compile("[0-9]{1,9}")
_Body = TypeVar("_Body")


def first_endless(
    bodies: Mapping[str, _Body], ends: Callable[[_Body, set[str]], bool]
) -> str | None:
    """The name of the first of which no text ends. ends: whether one of a body does, if those of
    the names in the set do. What is not told in a bounded number of rounds is taken to end."""
    known: set[str] = set()
    for _ in range(_MOST_ROUNDS):
        open_ = [name for name in bodies if name not in known]
        known.update(name for name in reversed(open_) if ends(bodies[name], known))
        if known.isdisjoint(open_):
            return next(iter(open_), None)
    return None


def endless_part(schema: Any) -> str | None:
    """The reference to a part of a JSON Schema, "#" for all of it, that texts of it may need and
    of which no text ends. What cannot be told is taken to end."""
    try:
        return first_endless(_reachable(schema), _ends)
    except RecursionError:
        return None


def _reachable(root: Any) -> dict[str, Any]:
    """What each reference stands for, the first is "#"."""
    bodies = {"#": root}
    waiting = [root]
    while waiting:
        for reference in _references(waiting.pop()):
            if reference not in bodies:
                bodies[reference] = _resolved(root, reference)
                waiting.append(bodies[reference])
    return bodies


def _references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, Mapping):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            for key, value in part.items():
                if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
                    waiting += value.values()
                elif key not in _NO_SCHEMAS:
                    waiting.append(value)


def _resolved(root: Any, reference: str) -> Any:
    pointer, _, path = reference.partition("#")
    if pointer or (path and not path.startswith("/")):
        return True  # not in here
    part = root
    for name in unquote(path).split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and _INDEX.fullmatch(key) and int(key) < len(part):
            part = part[int(key)]
        elif isinstance(part, Mapping) and key in part:
            part = part[key]
        else:
            return True
    return part


def _ends(schema: Any, known: set[str]) -> bool:
    if not isinstance(schema, Mapping):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in known:
        return False
    if not all(_ends(part, known) for part in _list(schema, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        parts = _list(schema, name)
        if parts and not any(_ends(part, known) for part in parts):
            return False
    if "const" in schema or "enum" in schema:
        return True
    types = schema.get("type")
    kinds = {types} if isinstance(types, str) else {*map(str, _list(schema, "type"))}
    if not kinds or kinds & _SCALARS:
        return True
    return ("object" in kinds and _object_ends(schema, known)) or (
        "array" in kinds and _array_ends(schema, known)
    )


def _object_ends(schema: Mapping[str, Any], known: set[str]) -> bool:
    properties = schema.get("properties")
    named = properties if isinstance(properties, Mapping) else {}
    others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    names = (name for name in _list(schema, "required") if isinstance(name, str))
    return all(_ends(named.get(name, others), known) for name in names)


def _array_ends(schema: Mapping[str, Any], known: set[str]) -> bool:
    least = schema.get("minItems", 0)
    if not isinstance(least, (int, float)) or least <= 0:
        return True
    first = _list(schema, "prefixItems")
    parts = first[: int(least)]
    if least > len(first):
        parts = [*parts, schema.get("items", True)]
    return all(_ends(part, known) for part in parts)


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
