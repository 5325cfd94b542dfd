"""JSON Schemas, regular expressions, grammars and choices, mutated, and texts under them."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from random import Random
from typing import Any

from json_mutations import mutated
from rounds import fuzz

from sbd_engine import Engine, SbdError

sys.path.insert(0, str(Path(__file__).parents[1]))
from python.schemas import CHOICES, GRAMMARS, REGEXES, schema

ENGINE = Engine(n_threads=1, n_ctx=192, kv_budget=64 << 20)
PLAIN: dict[str, Any] = {"prompt": "def add(a, b):", "max_tokens": 8}
EXPECTED = ENGINE.generate(**PLAIN)
SCHEMAS = [schema(seed) for seed in range(120)]
KEYWORDS: tuple[tuple[str, Any], ...] = (
    *(("not", {}), ("if", {"type": "null"}), ("uniqueItems", True), ("format", "regex")),
    *(("$ref", "#"), ("$ref", "#/$defs/node"), ("$ref", "file:///etc/passwd"), ("$id", "x")),
    *(("minItems", 10**6), ("maxLength", 10**7), ("minLength", 10**6), ("multipleOf", 1e-9)),
    *(("pattern", "(a|a)*" * 40), ("pattern", "(?=x)"), ("pattern", "a{1000}{1000}")),
    ("pattern", "^((a{1000}){1000}){1000}$"),
    *(("x-guidance", {"whitespace_flexible": True}), ("x-guidance", {"item_separator": "("})),
    *(("required", [f"r{i}" for i in range(2000)]), ("additionalProperties", {"$ref": "#"})),
    ("allOf", [{"anyOf": [{"minLength": i} for i in range(30)]}] * 12),
    ("anyOf", [{"type": "object", "properties": {f"p{i}": {}}} for i in range(300)]),
    *(("enum", ["e" * i for i in range(400)]), ("const", -(2**63) + 1), ("enum", [1e300, 1e-9])),
)
PIECES = (
    *("(", ")", "[", "]", "{", "}", "{9999}", "{2,1}", "*", "+", "?", "|", "^", "$", ".", "\\"),
    *("\\b", "\\p{L}", "(?i)", "(?=", "(?<n>", "[^", "\\x{110000}", "\\1", "é", "🙂", "\0", "\n"),
    *("(a+)+", "(.*)*", ".{1000}", "(?:a?){99}", "~", "&", '"', "/", ":", "start", "%ignore /a/"),
    *(
        "{999}){999}",
        "<[0-9]>",
        "<|endoftext|>",
        "%json {}",
        "%llguidance {}",
        "[lazy]",
        "start: start",
        "@x",
    ),
)


def text(random: Random, given: str) -> str:
    for _ in range(random.choice((0, 1, 1, 2, 5))):
        at, end = sorted(random.randrange(len(given) + 1) for _ in range(2))
        middle = random.choice((random.choice(PIECES), given[at:end] * random.choice((0, 2, 40)),
                                random.choice(string.printable)))  # fmt: skip
        given = given[:at] + middle + given[end if random.random() < 0.5 else at :]
    return given


def constraint(random: Random) -> dict[str, Any]:
    kind = random.randrange(8)
    if kind == 0:
        return {"regex": text(random, random.choice(REGEXES))}
    if kind == 1:
        return {"grammar": text(random, random.choice(GRAMMARS))}
    if kind == 2:
        choices = [text(random, each) for each in random.choice(CHOICES)]
        return {"choices": choices * random.choice((1, 1, 50))}
    made = mutated(random, random.choice(SCHEMAS), SCHEMAS, random.choice((0, 1, 2, 4)))
    if random.random() < 0.5:
        key, value = random.choice(KEYWORDS)
        made[key] = value
        if random.random() < 0.5:
            made = {"type": "object", "properties": {"in": made}, "required": ["in"]}
    if random.random() < 0.1:
        return {"json_schema": text(random, json.dumps(made))}
    return {"json_schema": made}


def one(random: Random) -> None:
    asked = {**PLAIN, **constraint(random), "max_tokens": random.choice((1, 6, 20))}
    asked["decoder"] = random.choice(("ntp", "sbd", "sbd_lossless"))
    asked["temperature"] = random.choice((0, 1))
    try:
        ENGINE.generate_batch([asked, PLAIN])
    finally:
        if ENGINE._core.n_sequences != 0:
            raise AssertionError(f"{ENGINE._core.n_sequences} sequences are still alive")
        if random.randrange(20) == 0 and ENGINE.generate(**PLAIN).tokens != EXPECTED.tokens:
            raise AssertionError("a text without a constraint is another one")


if __name__ == "__main__":
    sys.exit(fuzz(one, (SbdError,)))
