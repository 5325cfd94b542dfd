"""The unmasking rules: which of the masked positions one forward decides.

Every choice also says how near it came to being another, so that a float32 engine that differs by
rounding can be told from one that is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .stats import RowStats

Array = NDArray[np.float64]
RULES = ("entropy_bounded", "factor", "confidence", "top_n")
PROXIES = ("entropy", "confidence", "margin")


@dataclass(frozen=True)
class Rule:
    """An unmasking rule with the parameters of all; each rule reads only those named after it."""

    unmask: str = "entropy_bounded"
    gamma: float = 0.35  # entropy_bounded, in nats
    proxy: str = "entropy"  # entropy_bounded
    factor: float = 1.0  # factor
    confidence_threshold: float = 0.9  # confidence
    top_n: int = 1  # top_n

    def __post_init__(self) -> None:
        if self.unmask not in RULES:
            raise ValueError(f"expected unmask in {', '.join(RULES)}, got {self.unmask!r}")
        if self.proxy not in PROXIES:
            raise ValueError(f"expected proxy in {', '.join(PROXIES)}, got {self.proxy!r}")


def choose(stats: RowStats, rule: Rule) -> tuple[list[int], float]:
    """Rows of `stats` to unmask, ascending and at least one, and the margin of that choice.

    `stats` holds the masked candidates in order of position; equals go by position. The margin is
    the least change of a deciding quantity that could change the set: distance to the threshold,
    gap in the order behind the last one taken. It is inf where nothing could.
    """
    proxy = rule.proxy if rule.unmask == "entropy_bounded" else "confidence"
    key = {"entropy": stats.entropy, "confidence": -stats.top_prob, "margin": -stats.margin}[proxy]
    order = np.argsort(key, kind="stable")
    key = key[order]

    # The first n of the order are taken, n counting the s whose `tested[s - 1]` passes.
    if rule.unmask == "entropy_bounded":
        tested = entropy_bounds(stats.entropy[order])
        threshold, passes = rule.gamma, tested <= rule.gamma
    elif rule.unmask == "factor":
        tested = np.arange(2, len(key) + 2) * (1.0 - stats.top_prob[order])  # (s + 1)(1 - c_s)
        threshold, passes = rule.factor, tested < rule.factor
    elif rule.unmask == "confidence":
        tested = stats.top_prob[order]
        threshold, passes = rule.confidence_threshold, tested > rule.confidence_threshold
    else:
        tested = np.arange(1.0, len(key) + 1)
        threshold, passes = np.inf, tested <= rule.top_n
    n = max(1, int(passes.sum()))  # each of the tested grows or falls along the order

    # The first is taken whatever its test says, so only the others' distances count. In another
    # order than the entropies' it also matters which candidate is the first one refused.
    distances = np.abs(tested[max(n - 1, 1) : n + 1] - threshold)
    order_matters = 2 if proxy != "entropy" and rule.unmask == "entropy_bounded" else 1
    gaps = np.diff(key[n - 1 : n + order_matters])
    margin = float(np.min(np.concatenate([distances, gaps]), initial=np.inf))
    return sorted(int(i) for i in order[:n]), margin


def entropy_bounds(h: Array) -> Array:
    """sum_{j<=s} h_j - max_{j<=s} h_j for each s; the entropies `h` in the order of the proxy.

    Adding h_s to the sum and moving to the new maximum adds min(h_s, old maximum). In ascending
    order that is h_(s-1): the sum before the last element. Never sum minus maximum as written,
    which rounding can lift above a gamma of 0.
    """
    bounds = np.zeros_like(h)
    maximum = h[0]
    for s in range(1, len(h)):
        bounds[s] = bounds[s - 1] + min(h[s], maximum)
        maximum = max(h[s], maximum)
    return bounds
