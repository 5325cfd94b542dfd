"""Whether texts of a Lark grammar can end, as far as its rules are read here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .endless import first_endless

# What in a Lark grammar is no syntax: strings, comments, regular expressions.
LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|//.*|#.*|/(?:\\.|[^/\\])+/')
# A rule's name, its attributes and priority.
_HEAD = re.compile(r"^[ \t]*[!?]*([A-Za-z_][\w-]*)(?:\[[^\]]*\])?(?:\.\d+)?[ \t]*:", re.MULTILINE)
_UNREAD = re.compile(r"::|%(?:if|lark|override|extend)\b")  # grammars that have these are not
_STATEMENT = re.compile(r"^[ \t]*%(?:ignore|import|declare|llguidance)\b.*", re.MULTILINE)
_WORD = re.compile(
    r"(?P<skipped>\s+|->\s*[\w-]+)|(?P<literal>''(?:[a-z]+(?![\w-]))?|<[^>]*>|@[\w-]+|\.\.)|(?P<name>[\w-]+)"
    r"|(?P<count>\{\s*(?P<least>\d*)[^}]*\}|~\s*(?P<times>\d+)(?:\s*\.\.\s*\d+)?)|(?P<other>.)"
)
_Word = tuple[str, str]  # its kind and text


class _Unread(Exception):
    """A form that is not known here."""


def endless_rule(source: str) -> str | None:
    """The name of a rule that texts of the grammar may come to and of which none ends. A grammar
    with a form that is not known here is taken to end."""
    bare = LITERAL.sub(lambda found: "''" if found[0][0] in '"/' and found[0][:2] != "//" else "",
                       source)  # fmt: skip
    if _UNREAD.search(bare):
        return None
    try:
        rules = dict(_rules(_STATEMENT.sub("", bare)))
        return first_endless(_reachable(rules), _any_ends)
    except (_Unread, RecursionError):
        return None


def _rules(source: str) -> Iterator[tuple[str, list[Any]]]:
    heads = [*_HEAD.finditer(source)]
    # Names in capitals are terminals, which llguidance refuses where they need themselves.
    names = {head[1] for head in heads if not head[1].isupper()}
    ends = [*(head.start() for head in heads[1:]), len(source)]
    for head, end in zip(heads, ends, strict=False):
        words = [*_words(_without_data(source[head.end() : end]))]
        parsed = _alternatives(words, names)
        if words:
            raise _Unread
        if head[1] in names:
            yield head[1], parsed


def _without_data(body: str) -> str:
    """Objects of %json and %regex are literals."""
    kept, at = [], 0
    for found in re.finditer(r"%(?:json|regex)\s*(?=\{)", body):
        if found.start() < at:
            continue
        kept.append(body[at : found.start()])
        depth, at = 0, found.end()
        while at < len(body):
            depth += (body[at] == "{") - (body[at] == "}")
            at += 1
            if depth == 0:
                break
        kept.append("''")
    return "".join([*kept, body[at:]])


def _words(body: str) -> Iterator[_Word]:
    """From the last, for a parser that pops."""
    found = [each for each in _WORD.finditer(body) if each.lastgroup != "skipped"]
    for each in reversed(found):
        if each["count"] is not None:
            yield "count", each["least"] or each["times"] or "0"
        else:
            yield str(each.lastgroup), each[0]


def _alternatives(words: list[_Word], names: set[str]) -> list[list[Any]]:
    """Of sequences of literals (None), names, and groups, which are alternatives again."""
    sequences: list[list[Any]] = [[]]
    while words and words[-1][1] not in (")", "]"):
        kind, text = words.pop()
        if text == "|":
            sequences.append([])
        elif kind == "literal":
            sequences[-1].append(None)
        elif kind == "name":
            sequences[-1].append(text if text in names else None)
        elif text in ("(", "["):
            group = _alternatives(words, names)
            if not words or words.pop()[1] != {"(": ")", "[": "]"}[text]:
                raise _Unread
            sequences[-1].append([*group, []] if text == "[" else group)
        elif (text in ("?", "*") or (kind, text) == ("count", "0")) and sequences[-1]:
            sequences[-1][-1] = [[sequences[-1][-1]], []]
        elif not (text == "+" or kind == "count"):
            raise _Unread
    return sequences


def _reachable(rules: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """From `start`, which is the first."""
    found: dict[str, list[Any]] = {}
    waiting = ["start"] if "start" in rules else []
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = rules[name]
            waiting += _names(rules[name])
    return found


def _names(alternatives: list[Any]) -> Iterator[str]:
    for sequence in alternatives:
        for part in sequence:
            if isinstance(part, str):
                yield part
            elif part is not None:
                yield from _names(part)


def _any_ends(alternatives: list[Any], known: set[str]) -> bool:
    return any(all(_part_ends(part, known) for part in sequence) for sequence in alternatives)


def _part_ends(part: Any, known: set[str]) -> bool:
    return part is None or (part in known if isinstance(part, str) else _any_ends(part, known))
