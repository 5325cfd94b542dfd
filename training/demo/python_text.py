"""Generated Python: small functions, classes and scripts.

All of it is in `ast.unparse`'s layout: one way to write everything leaves a small model less to
guess. What is generated is a pure function of the `random.Random` handed in.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from textwrap import dedent

_TEMPLATES = Path(__file__).parent / "templates"
WORDS = (_TEMPLATES / "words.txt").read_text(encoding="utf-8").split()

OPERATORS = {
    "+": "add sum plus",
    "-": "subtract sub minus difference",
    "*": "multiply mul product times",
    "/": "divide div",
    "%": "mod modulo remainder",
    "**": "power pow",
    "//": "floor_divide",
    "==": "equal equals",
    "!=": "not_equal",
    "<": "less less_than",
    ">": "greater greater_than",
    "and": "both",
    "or": "either",
}
BINARY = [(name, operator) for operator, names in OPERATORS.items() for name in names.split()]
PAIRS = "a b,x y,left right,first second,n m,p q,u v,one two,value other".split(",")
NUMBERS = "n x number value num k i a".split()
SEQUENCES = "items values numbers data array arr lst nums elements xs sequence".split()
TEXTS = "text s string word name line message".split()


def _templates(name: str) -> list[str]:
    """The templates of a file. An unindented line after an empty one begins the next, but what
    follows an import belongs to it.

    $n is a number, $s a sequence, $e an element of it, $t a text, $d $D digits, $w $W $f $g words.
    """
    units: list[list[str]] = []
    text = (_TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")
    lines = text.strip().split("\n")
    for i, line in enumerate(lines):
        opens = i == 0 or (lines[i - 1] == "" and line[:1] not in ("", " "))
        imports = bool(units) and units[-1][0].startswith(("import ", "from "))
        continues = imports and line.startswith(("def ", "@", "class "))
        if opens and not continues:
            units.append([])
        units[-1].append(line)
    return ["\n".join(unit).strip() for unit in units]


_FUNCTIONS, _FIELDS = _templates("functions"), _templates("fields")
_SCRIPTS, _CLASSES = _templates("scripts"), _templates("classes")


def _fill(template: str, rng: Random) -> str:
    word, field, other = rng.sample(WORDS, 3)
    sequence = rng.choice(SEQUENCES)
    initial = sequence[0] if rng.random() < 0.3 else "item"
    element = {"xs": "x", "data": "item", "lst": "item"}.get(sequence, initial)
    values = {
        "$ws": word + "s",
        "$w": word,
        "$W": word.capitalize(),
        "$f": field,
        "$g": other,
        "$n": rng.choice(NUMBERS),
        "$s": sequence,
        "$e": element,
        "$t": rng.choice(TEXTS),
        "$d": str(rng.choice([3, 5, 10, 10, 20, 100])),
        "$D": str(rng.randint(1, 9)),
    }
    for key, value in values.items():
        template = template.replace(key, value)
    return template


def _binary(rng: Random) -> str:
    name, operator = rng.choice(BINARY)
    pair = rng.choice(PAIRS[:2] if rng.random() < 0.5 else PAIRS)
    left, right = pair.split()
    if rng.random() < 0.2:
        name += rng.choice(["_numbers", "_values", "_two", "_" + rng.choice(WORDS)])
    return f"def {name}({left}, {right}):\n    return {left} {operator} {right}"


def _field_function(rng: Random) -> str:
    """A function whose name says what it does to a field or a list of things."""
    thing, field = rng.sample(WORDS, 2)
    template = rng.choice(_FIELDS)
    return template.replace("$w", thing).replace("$W", thing.capitalize()).replace("$f", field)


def _record_class(rng: Random) -> str:
    name, *fields = rng.sample(WORDS, rng.randint(2, 4))
    cls = name.capitalize()
    init = "".join(f"        self.{f} = {f}\n" for f in fields)
    parts = [f"class {cls}:\n\n    def __init__(self, {', '.join(fields)}):\n{init}"]
    for f in fields:
        parts.append(f"    def get_{f}(self):\n        return self.{f}\n")
        if rng.random() < 0.5:
            parts.append(f"    def set_{f}(self, {f}):\n        self.{f} = {f}\n")
    if rng.random() < 0.5:
        shown = ", ".join(f"{{self.{f}}}" for f in fields)
        parts.append(f"    def __repr__(self):\n        return f'{cls}({shown})'\n")
    if rng.random() < 0.3:
        key = fields[0]
        parts.append(f"    def __eq__(self, other):\n        return self.{key} == other.{key}\n")
    return "\n".join(parts).strip()


def _container_class(rng: Random) -> str:
    name, item = rng.sample(WORDS, 2)
    return (
        f"class {name.capitalize()}:\n\n    def __init__(self):\n        self.{item}s = []\n\n"
        f"    def add(self, {item}):\n        self.{item}s.append({item})\n\n"
        f"    def remove(self, {item}):\n        self.{item}s.remove({item})\n\n"
        f"    def __len__(self):\n        return len(self.{item}s)\n\n"
        f"    def __iter__(self):\n        return iter(self.{item}s)"
    )


def _error_class(rng: Random) -> str:
    base = rng.choice(["Exception", "ValueError", "RuntimeError"])
    return f"class {rng.choice(WORDS).capitalize()}Error({base}):\n    pass"


def python_document(rng: Random) -> str:
    """A small Python document. One in four starts at some line, or word of a line, further down:
    a prompt may be any piece of code."""
    text = _whole_document(rng)
    if rng.random() >= 0.25:
        return text
    lines = text.split("\n")
    first = rng.randrange(len(lines))
    rest = dedent("\n".join(lines[first:])).lstrip("\n")
    words = rest.split("\n", 1)[0].split(" ")
    return rest if rng.random() < 0.5 else rest.split(" ", rng.randrange(len(words)))[-1]


def _whole_document(rng: Random) -> str:
    """Functions, a class, or a script."""
    kind = rng.random()
    if kind < 0.20:
        return "\n\n".join(_binary(rng) for _ in range(rng.choice([1, 1, 2, 3])))
    if kind < 0.50:
        count = rng.choice([1, 1, 1, 2])
        return "\n\n".join(_fill(rng.choice(_FUNCTIONS), rng) for _ in range(count))
    if kind < 0.66:
        return "\n\n".join(_field_function(rng) for _ in range(rng.choice([1, 1, 2])))
    if kind < 0.80:
        return _fill(rng.choice(_SCRIPTS), rng)
    if kind < 0.86:
        return rng.choice(_CLASSES)
    if kind < 0.94:
        return _record_class(rng)
    return _container_class(rng) if kind < 0.98 else _error_class(rng)
