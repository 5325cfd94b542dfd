"""Whether texts of a JSON Schema can end: one that needs another of its kind in it never does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_SCALARS = {"string", "number", "integer", "boolean", "null"}


def can_end(schema: Any) -> bool:
    """What cannot be told is taken to end."""
    try:
        return _Schema(schema).can_end()
    except RecursionError:
        return True


class _Schema:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._ends: set[str] = set()  # references that are known to
        self._seen: set[str] = set()  # in this round

    def can_end(self) -> bool:
        """The least that holds: until a round finds no reference more that ends, one that is on its
        way counts as one that does not."""
        while True:
            known = len(self._ends)
            self._seen.clear()
            if self._part_ends(self._root):
                return True
            if len(self._ends) == known:
                return False

    def _part_ends(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return schema is not False
        reference = schema.get("$ref")
        if isinstance(reference, str) and not self._reference_ends(reference):
            return False
        if not all(map(self._part_ends, _list(schema, "allOf"))):
            return False
        for name in ("anyOf", "oneOf"):
            if _list(schema, name) and not any(map(self._part_ends, _list(schema, name))):
                return False
        if "const" in schema or "enum" in schema:
            return True
        types = schema.get("type")
        kinds = {types} if isinstance(types, str) else {*map(str, _list(schema, "type"))}
        if not kinds or kinds & _SCALARS:
            return True
        return ("object" in kinds and self._object_ends(schema)) or (
            "array" in kinds and self._array_ends(schema)
        )

    def _reference_ends(self, reference: str) -> bool:
        if reference in self._ends:
            return True
        if reference in self._seen:
            return False
        self._seen.add(reference)
        if self._part_ends(self._resolved(reference)):
            self._ends.add(reference)
        return reference in self._ends

    def _resolved(self, reference: str) -> Any:
        pointer, _, path = reference.partition("#")
        if pointer or (path and not path.startswith("/")):
            return True  # not in here
        part = self._root
        for name in unquote(path).split("/")[1:]:
            key = name.replace("~1", "/").replace("~0", "~")
            if isinstance(part, list) and key.isdigit() and int(key) < len(part):
                part = part[int(key)]
            elif isinstance(part, Mapping) and key in part:
                part = part[key]
            else:
                return True
        return part

    def _object_ends(self, schema: Mapping[str, Any]) -> bool:
        properties = schema.get("properties")
        known = properties if isinstance(properties, Mapping) else {}
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        names = (name for name in _list(schema, "required") if isinstance(name, str))
        return all(self._part_ends(known.get(name, others)) for name in names)

    def _array_ends(self, schema: Mapping[str, Any]) -> bool:
        least = schema.get("minItems", 0)
        if not isinstance(least, (int, float)) or least <= 0:
            return True
        first = _list(schema, "prefixItems")
        parts = first[: int(least)]
        if least > len(first):
            parts = [*parts, schema.get("items", True)]
        return all(map(self._part_ends, parts))


def _list(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
