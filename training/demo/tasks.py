"""Six families of tasks with one exact answer each, and which questions training must never see.

A question is held out by a hash of its prompt, so no list of them is needed to keep them out: the
training draw skips every such prompt, and the shipped questions are drawn from nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

HELD_OUT_SHARE = 1 / 8


class Task(NamedTuple):
    family: str
    prompt: str
    answer: str


def _read(name: str) -> list[list[str]]:
    """A word list; each line is a list of its own."""
    text = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    return [line.split() for line in text.splitlines()]


WORDS = [word for line in _read("task_words.txt") for word in line]
ORDERED_WORDS = sorted(WORDS)[::2]  # the only ones to be sorted: an order a small model can learn
NAMES, CITIES, JOBS, COLORS, THINGS, DAYS = _read("task_names.txt")
VOCABULARY = [*WORDS, *NAMES, *CITIES, *JOBS, *COLORS, *THINGS, *DAYS]


def is_held_out(prompt: str) -> bool:
    """Whether a question belongs to the held-out ones, however its letters and spaces are set."""
    digest = hashlib.sha256(" ".join(prompt.casefold().split()).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def addition(rng: Random) -> tuple[str, str]:
    a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.randint(2, 4), rng.randint(2, 4)))
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, carry {total // 10}")
        carry = total // 10
    return f"Add {a} + {b}\n", "\n".join([*lines, f"answer {a + b}"])


def _in_commas(words: list[str]) -> str:
    return ", ".join(words)


def _in_brackets(words: list[str]) -> str:
    return json.dumps(words)


def _in_lines(words: list[str]) -> str:
    return "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))


LAYOUTS: dict[str, Callable[[list[str]], str]] = {
    "with commas": _in_commas,
    "as a list": _in_brackets,
    "in lines": _in_lines,
}


def _rearrangement(verb: str, rng: Random, given: list[str], wanted: list[str]) -> tuple[str, str]:
    how, layout = rng.choice(list(LAYOUTS.items()))
    return f"{verb} {how}: {' '.join(given)}\n", layout(wanted)


def copying(rng: Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(5, 8))
    if rng.random() < 0.25:
        line = " ".join(words)
        return f"Copy twice: {line}\n", f"{line}\n{line}"
    return _rearrangement("Copy", rng, words, words)


def reversing(rng: Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(4, 8))
    return _rearrangement("Reverse", rng, words, words[::-1])


def sorting(rng: Random) -> tuple[str, str]:
    words = rng.sample(ORDERED_WORDS, rng.randint(4, 7))
    return _rearrangement("Sort", rng, words, sorted(words))


def problem(rng: Random) -> tuple[str, str]:
    """Two or three small steps, each written out with its result."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    a, b, c = rng.randint(31, 60), rng.randint(2, 15), rng.randint(2, 15)
    k, m = rng.randint(2, 9), rng.randint(3, 9)
    more, total = a + b, k * m + b
    text, steps, end = rng.choice([
        (
            f"{name} has {a} {things}, buys {b} more and gives {c} to {other}. "
            f"How many {things} does {name} have?",
            [("+", a, b), ("-", more, c)],
            f"{name} has {more - c} {things}.",
        ),
        (
            f"{name} has {a} {things}. {other} has {b} more than {name}, but loses {c}. "
            f"How many {things} does {other} have?",
            [("+", a, b), ("-", more, c)],
            f"{other} has {more - c} {things}.",
        ),
        (
            f"{name} finds {a} {things} on {DAYS[0]}, {b} on {DAYS[1]} and {c} on {DAYS[2]}. "
            f"How many {things} does {name} find?",
            [("+", a, b), ("+", more, c)],
            f"{name} finds {more + c} {things}.",
        ),
        (
            f"A shop has {a} {things}. {name} buys {b} and {other} buys {c}. "
            f"How many {things} does the shop have?",
            [("-", a, b), ("-", a - b, c)],
            f"The shop has {a - b - c} {things}."
        ),
        (
            f"{name} has {k} boxes of {m} {things} and {b} more. "
            f"How many {things} does {name} have?",
            [("*", k, m), ("+", k * m, b)],
            f"{name} has {total} {things}.",
        ),
        (
            f"{name} fills {k} boxes with {m} {things}, gets {b} more from {other} and buys {c}. "
            f"How many {things} does {name} have?",
            [("*", k, m), ("+", k * m, b), ("+", total, c)],
            f"{name} has {total + c} {things}.",
        ),
    ])  # fmt: skip
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    lines = [f"{x} {sign} {y} = {results[sign](x, y)}" for sign, x, y in steps]
    return f"{text}\n", "\n".join([*lines, end])


def record(rng: Random) -> tuple[str, str]:
    """A sentence, or its fields in any order, to be written as a JSON object of a fixed order."""
    name, (city, goal), day = rng.choice(NAMES), rng.sample(CITIES, 2), rng.choice(DAYS)
    job, color, word = rng.choice(JOBS), rng.choice(COLORS), rng.choice(WORDS)
    age, price, count = rng.randint(18, 80), rng.randint(2, 99), rng.randint(2, 60)
    paid = rng.random() < 0.5
    sentence, fields = rng.choice([
        (
            f"{name} is {age} years old, works as a {job} and lives in {city}.",
            {"name": name, "age": age, "job": job, "city": city},
        ),
        (
            f"The {color} {word} costs {price} dollars, and {count} are in stock.",
            {"item": word, "color": color, "price": price, "stock": count},
        ),
        (
            f"{name} goes from {city} to {goal} on {day} for {price} dollars.",
            {"name": name, "start": city, "goal": goal, "day": day, "price": price},
        ),
        (
            f"On {day} {name} ordered {count} of the {color} {word} and has "
            f"{'paid' if paid else 'not paid'}.",
            {"name": name, "item": word, "color": color, "count": count, "day": day, "paid": paid},
        ),
    ])  # fmt: skip
    table: list[tuple[str, Any]] = rng.sample(list(fields.items()), len(fields))
    rows = ", ".join(f"{key} is {_in_words(value)}" for key, value in table)
    text = sentence if rng.random() < 0.5 else f"{' '.join(fields)}: {rows}."
    return f"JSON: {text}\n", json.dumps(fields)


def _in_words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


FAMILIES: dict[str, Callable[[Random], tuple[str, str]]] = {
    "addition": addition,
    "copying": copying,
    "reversing": reversing,
    "sorting": sorting,
    "problems": problem,
    "records": record,
}


def draw_task(family: str, rng: Random, held_out: bool) -> Task:
    """A task of the family, from the questions that are held out or from all the others."""
    while True:
        prompt, answer = FAMILIES[family](rng)
        if is_held_out(prompt) == held_out:
            return Task(family, prompt, answer)


def held_out_tasks(per_family: int, seed: int = 0) -> list[Task]:
    """Different held-out questions, as many of each family."""
    tasks: dict[str, Task] = {}
    for family in FAMILIES:
        rng, wanted = Random(f"{seed} {family}"), len(tasks) + per_family
        while len(tasks) < wanted:
            task = draw_task(family, rng, held_out=True)
            tasks.setdefault(task.prompt, task)
    return list(tasks.values())


def write_held_out(path: Path, per_family: int = 200) -> None:
    lines = (json.dumps(task._asdict()) + "\n" for task in held_out_tasks(per_family))
    path.write_text("".join(lines), encoding="utf-8")
