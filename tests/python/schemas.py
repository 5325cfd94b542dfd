"""JSON Schemas of many kinds, made by a seed, and regular expressions, grammars and choices."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]
NAMES = ("a", "id", "name", "größe", 'with "quotes"', "x-y", "count", "tags", "🙂", "$ref")
TEXTS = ("", "a", "yes", "no", "naïve", "line\nend", 'say "hi"', "🙂", "ß", "</s>", "\\")


def number(random: Random, depth: int) -> Schema:
    schema: Schema = {"type": random.choice(("integer", "number"))}
    low = random.randrange(-50, 50)
    if random.random() < 0.7:
        schema[random.choice(("minimum", "exclusiveMinimum"))] = low
    if random.random() < 0.7:
        schema[random.choice(("maximum", "exclusiveMaximum"))] = low + random.randrange(5, 999)
    if schema["type"] == "integer" and random.random() < 0.2:
        schema["multipleOf"] = random.choice((2, 5))
    return schema


def string(random: Random, depth: int) -> Schema:
    kind = random.randrange(4)
    if kind == 0:
        low = random.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + random.randrange(1, 6)}
    if kind == 1:
        pattern = random.choice((r"^[a-z]{1,4}$", r"^\d{3}-\d{2}$", "^(on|off)$", r"^[A-F0-9]+$"))
        return {"type": "string", "pattern": pattern}
    if kind == 2:
        return {"type": "string", "format": random.choice(("date", "ipv4", "uuid", "time"))}
    return {"type": "string", "maxLength": 8}


def fixed(random: Random, depth: int) -> Schema:
    values = [random.choice((*TEXTS, 0, -3, 2.5, None, True, False, [1, "a"], {"k": None}))]
    if random.random() < 0.3:
        return {"const": values[0]}
    values += [f"{i}{random.choice(TEXTS)}" for i in range(random.randrange(1, 6))]
    return {"enum": values}


def plain(random: Random, depth: int) -> Schema:
    return {"type": random.choice(("boolean", "null", ["null", "boolean"]))}


def array(random: Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": any_schema(random, depth + 1)}
    low = random.randrange(3)
    schema |= {"minItems": low, "maxItems": low + random.randrange(3)}
    if random.random() < 0.3:
        first = [any_schema(random, depth + 1) for _ in range(2)]
        schema |= {"prefixItems": first, "items": False, "minItems": 2, "maxItems": 2}
    return schema


def object_(random: Random, depth: int) -> Schema:
    names = random.sample(NAMES, random.randrange(1, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: any_schema(random, depth + 1) for name in names},
        "required": [name for name in names if random.random() < 0.7],
        "additionalProperties": False,
    }
    if random.random() < 0.2:
        schema["title"], schema["description"] = "Thing", "what it is"
    return schema


def mapping(random: Random, depth: int) -> Schema:
    inner = any_schema(random, depth + 1)
    if random.random() < 0.5:
        return {"type": "object", "patternProperties": {"^[a-c]$": inner}, "maxProperties": 2,
                "additionalProperties": False}  # fmt: skip
    return {"type": "object", "additionalProperties": inner, "maxProperties": 2}


def one_of_several(random: Random, depth: int) -> Schema:
    return {"anyOf": [any_schema(random, depth + 1) for _ in range(random.randrange(2, 4))]}


def all_of(random: Random, depth: int) -> Schema:
    return {
        "allOf": [
            {"type": "object", "properties": {"a": number(random, depth)}, "required": ["a"]},
            {"properties": {"b": plain(random, depth)}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "type": "object",
        "properties": {"a": True, "b": True},
    }


def recursive(random: Random, depth: int) -> Schema:
    return {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": number(random, 9),
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }


LEAVES: tuple[Callable[[Random, int], Schema], ...] = (number, string, fixed, plain)
INNER = (array, object_, object_, mapping, one_of_several)


def any_schema(random: Random, depth: int = 0) -> Schema:
    makers = LEAVES if depth >= 3 or random.random() < 0.5 else INNER
    return random.choice(makers)(random, depth)


def schema(seed: int) -> Schema:
    """The seed's, one whose texts are likely to end."""
    random = Random(f"schema {seed}")
    made = (*INNER, all_of, recursive, *LEAVES)[seed % (len(INNER) + 2 + len(LEAVES))]
    return made(random, 0)


REGEXES = (
    *("[0-9]{1,3}", "(yes|no|maybe)", "[a-z]+@[a-z]+\\.com", "x", "(ab)*c", "[^a-z]{2,4}"),
    *("\\d{4}-\\d{2}-\\d{2}", "é{2,3}", "(🙂|🙃)+!", "a{0,3}b?", "\\w+( \\w+){0,2}"),
    "[\\x00-\\x7f]{3}",
)  # fmt: skip
GRAMMARS = (
    'start: expr\nexpr: term ("+" term)*\nterm: NUMBER | "(" expr ")"\nNUMBER: /[0-9]{1,2}/\n',
    'start: "SELECT " name ("," name)* " FROM " name\nname: /[a-z]{1,5}/\n',
    'start: greeting " " WHO "!"\ngreeting: "hello" | "bye"\nWHO: /[A-Z][a-z]{0,4}/\n',
    'start: pair~1..3\npair: KEY "=" VALUE ";"\nKEY: /[a-c]/\nVALUE: /[0-9]{1,2}/\n',
)
CHOICES = (
    ["yes", "no"],
    ["a", "ab", "abc"],
    ["positive", "negative", "neutral"],
    ["one thing", "one other thing", "something else"],
    ["(.*)", "[a]", "a|b", "x{2}", "^$", "\\d"],
    ["naïve", "🙂", "日本語"],
    ["only"],
)


def constraints(n_schemas: int) -> list[dict[str, Any]]:
    """As arguments of generate."""
    return [
        *({"json_schema": schema(seed)} for seed in range(n_schemas)),
        {"json_schema": {"type": "object"}},
        {"json_schema": json.dumps(schema(3))},
        *({"regex": regex} for regex in REGEXES),
        *({"grammar": grammar} for grammar in GRAMMARS),
        *({"choices": choices} for choices in CHOICES),
    ]
