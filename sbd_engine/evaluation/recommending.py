"""Which of a sweep's settings to take, or why none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .intervals import share
from .sweeping import LOSSLESS

_FEWEST = 20  # questions, below which nothing is said of others
_ROUNDING = 1e-12  # 0.9 - 0.89 is not quite 0.01

Row = dict[str, Any]  # of the report: options of a setting, and its figures


@dataclass(frozen=True)
class Evidence:
    """How much can be told from `questions`: where none of their answers (or tokens, without
    answers) got worse, up to `hidden_loss` of all others still might (95 %). needed: how many
    questions show a loss of `max_loss`; None: no number does."""

    questions: int
    max_loss: float
    hidden_loss: float
    needed: int | None

    @property
    def enough(self) -> bool:
        return self.needed is not None and self.questions >= self.needed


@dataclass(frozen=True)
class Recommendation:
    """best: the row to take. Without one, or beside one that needs no evidence, `reason` says what
    kept the others away, and `nearest` is the foremost of them."""

    best: Row | None = None
    reason: str = ""  # "ntp is never right", "slower", "loss", "evidence", or none
    nearest: Row | None = None


def evidence(questions: int, judged: int, max_loss: float) -> Evidence:
    """judged: answers, or without answers tokens, of all the questions."""
    hidden = 1 - share(judged, judged).low
    if max_loss <= 0:
        return Evidence(questions, max_loss, hidden, None)
    odds = hidden / (1 - hidden)
    shown = math.ceil(questions * odds * (1 - max_loss) / max_loss)
    return Evidence(questions, max_loss, hidden, max(shown, _FEWEST))


def recommend(rows: Sequence[Row], known: Evidence) -> Recommendation:
    """Of the settings that lose no more than `known.max_loss` (a share) of quality, as far as
    there is evidence, and are not slower than NTP (the first row): the one of most tokens per
    forward among those as fast as the fastest, within the intervals.

    sbd_lossless needs no evidence, as its text is NTP's.
    """
    ntp, *others = rows
    if ntp["quality"]["value"] == 0:
        return Recommendation(reason="ntp is never right")
    fast = [row for row in others if _is_faster(row)]
    kept = [row for row in fast if row["loss"]["value"] <= known.max_loss + _ROUNDING]
    sure = [row for row in kept if known.enough or row["decoder"] == LOSSLESS]
    best = _foremost(sure)
    if best is not None and known.enough:
        return Recommendation(best)
    if not fast:
        fastest = max(others, key=lambda row: row["speedup"]["value"])
        return Recommendation(None, "slower", fastest)
    least = min(fast, key=lambda row: row["loss"]["value"])
    return Recommendation(best, "loss" if known.enough else "evidence", _foremost(kept) or least)


def _is_faster(row: Row) -> bool:
    """Than NTP, in time and in forwards."""
    return bool(row["speedup"]["value"] >= 1 and row["tokens_per_forward"]["value"] > 1)


def _foremost(rows: Sequence[Row]) -> Row | None:
    if not rows:
        return None
    fastest = max(rows, key=lambda row: row["speedup"]["value"])["speedup"]
    alike = [row for row in rows if row["speedup"]["high"] >= fastest["low"]]
    return max(alike, key=lambda row: row["tokens_per_forward"]["value"])
