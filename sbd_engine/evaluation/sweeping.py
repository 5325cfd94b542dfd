"""The curve of quality against tokens per forward, and the gamma that it recommends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import SbdValueError
from ..parameters import unknown
from .answering import NTP, Setting, plain

GAMMAS = (0.0, 0.01, 0.1, 0.2, 0.4, 0.8, 1.5)  # of the paper's ablation


class Rule(NamedTuple):
    """An unmasking rule: the option that sets how bold it is, and values from careful to bold."""

    option: str
    ladder: tuple[float, ...]


RULES = {
    "entropy_bounded": Rule("gamma", GAMMAS),
    "factor": Rule("factor", (0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0)),
    "confidence": Rule("confidence_threshold", (0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5)),
    "top_n": Rule("top_n", (1, 2, 3, 4, 5, 6, 8)),
}


class Point(NamedTuple):
    """One setting of the sweep."""

    block_size: int
    unmask: str
    value: float  # of the rule's option

    @property
    def option(self) -> str:
        return RULES[self.unmask].option

    def setting(self) -> Setting:
        options = {
            "decoder": "sbd",
            "block_size": self.block_size,
            "unmask": self.unmask,
            self.option: self.value,
        }
        name = f"block_size {self.block_size}, {self.option} {self.value:g}"
        return Setting(name, options)


def grid(block_sizes: Iterable[int], rules: Iterable[str], gammas: Sequence[float]) -> list[Point]:
    """Every rule's ladder in every block size; top_n ends with the whole block."""
    points = []
    for size in block_sizes:
        for name in rules:
            if name not in RULES:
                raise SbdValueError(unknown("unmask", name, list(RULES)))
            values = gammas if name == "entropy_bounded" else RULES[name].ladder
            if name == "top_n":
                values = sorted({min(value, size) for value in values})
            points += [Point(size, name, value) for value in values]
    return points


def settings(points: Sequence[Point]) -> list[Setting]:
    return [Setting(NTP, {"decoder": NTP}), *(point.setting() for point in points)]


def as_row(point: Point | None, figures: dict[str, Any]) -> dict[str, Any]:
    """A line of the report; None is NTP."""
    options: dict[str, Any] = {"decoder": NTP} if point is None else plain(point.setting().options)
    return {**options, **figures}


def recommend(rows: Sequence[dict[str, Any]], max_loss: float) -> dict[str, Any] | None:
    """Of the rows decoded with entropy_bounded, the one of most tokens per forward among those that
    lose at most `max_loss` (a share) of quality. None where all lose more, or where there is
    nothing to lose: the first row, NTP's, has quality 0."""
    if not rows or rows[0]["quality"]["value"] == 0:
        return None
    fit = [
        row
        for row in rows
        if row.get("unmask") == "entropy_bounded" and row["loss"]["value"] <= max_loss + 1e-12
    ]
    return max(fit, key=lambda row: row["tokens_per_forward"]["value"], default=None)
