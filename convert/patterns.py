"""The regular expressions of an adapter's configuration, matched without ever going back.

They come with a download, and Python's `re` can take for ever over ten characters. Here a part of a
pattern takes all positions of the text at which it may begin to all at which it may end, so that
every position is met once a part. What has no place in a module's name (look-arounds, references)
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import reduce

from .errors import ConvertError

Positions = frozenset[int]
Part = Callable[[str, Positions], Positions]
MOST_STEPS = 30_000_000  # positions met by all parts of all patterns: ten seconds
MOST_DEPTH = 50  # groups within groups
# A single character: escaped, of a class, or any that has no other meaning.
CHARACTER = re.compile(r"\\([^\W\d_]|[\W_])|\[\^?\]?(?:\\.|[^\]\\])*\]|[^()|*+?{}\[\]\\^$]", re.S)
REPEATS = re.compile(r"(?:\{(\d{0,4})(,?)(\d{0,4})\}|[*+?])\??")
NAMED_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Patterns:
    """What a dict of patterns says of each module, by PEFT's rule: the first one that matches the
    end of the module's name, from its beginning or behind a dot."""

    def __init__(self, values: dict[str, float], source: str) -> None:
        self._source = source
        self._steps = MOST_STEPS
        self._values = [(self._compiled(text), value) for text, value in values.items()]

    def get(self, module: str, default: float) -> float:
        starts = frozenset({0} | {i + 1 for i, letter in enumerate(module) if letter == "."})
        for part, value in self._values:
            if len(module) in part(module, starts):
                return value
        return default

    def _compiled(self, text: str) -> Part:
        parser = _Parser(text, self._count)
        try:
            return parser.whole()
        except (ValueError, re.error) as error:
            raise ConvertError(f"{self._source}: pattern {text!r:.80}: {error}") from None

    def _count(self, positions: Positions) -> None:
        self._steps -= len(positions) + 1
        if self._steps < 0:
            raise ConvertError(f"{self._source}: takes too long to match: give plainer patterns")


class _Parser:
    def __init__(self, text: str, count: Callable[[Positions], None]) -> None:
        self.text, self.at, self.depth, self.count = text, 0, 0, count

    def whole(self) -> Part:
        part = self.alternatives()
        if self.at < len(self.text):
            raise ValueError(f"expected no {self.text[self.at]!r} at {self.at}")
        return part

    def alternatives(self) -> Part:
        options = [self.sequence()]
        while self.taken("|"):
            options.append(self.sequence())
        if len(options) == 1:
            return options[0]
        return lambda text, at: frozenset[int]().union(*(option(text, at) for option in options))

    def sequence(self) -> Part:
        parts: list[Part] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.plain_run() or self.repeated(self.single()))
        return lambda text, at: reduce(lambda ends, part: part(text, ends), parts, at)

    def plain_run(self) -> Part | None:
        """As many characters as stand here without a repeat, matched at once: most patterns are
        nothing else."""
        first, length = self.at, 0
        while match := CHARACTER.match(self.text, self.at):
            if REPEATS.match(self.text, match.end()):
                break
            self.check(match)
            self.at = match.end()
            length += 1
        return self.characters(self.text[first : self.at], length) if length else None

    def single(self) -> Part:
        """What a repeat behind it repeats."""
        if self.taken("^"):
            return lambda text, at: at & {0}
        if self.taken("$"):
            return lambda text, at: at & {len(text)}
        if self.taken("("):
            self.taken("?:")
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise ValueError(f"expected at most {MOST_DEPTH} groups within groups")
            part = self.alternatives()
            self.depth -= 1
            if not self.taken(")"):
                raise ValueError("expected a ) for each (")
            return part
        match = self.check(CHARACTER.match(self.text, self.at))
        self.at = match.end()
        return self.characters(match[0], 1)

    def check(self, match: re.Match[str] | None) -> re.Match[str]:
        """That it is a character; not a reference or the edge of a word."""
        if match is None or (match[1] and match[1].isalpha() and match[1] not in "dDsSwW"):
            raise ValueError(f"not understood at {self.at}: {self.text[self.at :]!r:.20}")
        return match

    def characters(self, pattern: str, length: int) -> Part:
        matches = re.compile(pattern).match

        def part(text: str, at: Positions) -> Positions:
            self.count(at)
            return frozenset(i + length for i in at if matches(text, i))

        return part

    def repeated(self, part: Part) -> Part:
        match = REPEATS.match(self.text, self.at)
        if match is None:
            return part
        self.at = match.end()
        if match[0][0] in NAMED_REPEATS:
            least, most = NAMED_REPEATS[match[0][0]]
        elif match[1] or match[2]:
            least = int(match[1] or 0)
            most = int(match[3]) if match[3] else None if match[2] else least
        else:
            raise ValueError(f"not understood: {match[0]!r}")
        if most is not None and most < least:
            raise ValueError(f"expected {match[0]} the other way round")

        def repeats(text: str, at: Positions) -> Positions:
            for _ in range(least):
                at = part(text, at)
                self.count(at)
            ends = fresh = at
            rounds = 0
            while fresh and (most is None or rounds < most - least):
                fresh = part(text, fresh) - ends
                ends |= fresh
                rounds += 1
                self.count(fresh)
            return ends

        return repeats

    def taken(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        if found:
            self.at += len(token)
        return found
