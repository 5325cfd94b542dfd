"""95 % intervals: of a share, of the difference of two shares on the same questions, of a ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054  # of 95 %
_RESAMPLES = 2000

Columns = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return self._asdict()


def share(successes: int, n: int) -> Estimate:
    """successes / n with Wilson's score interval. n > 0."""
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    reach = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # The ends are exact where nothing, or everything, succeeded: there rounding would miss them.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == n else centre + reach
    return Estimate(p, low, high)


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """Share of `first` minus share of `second`, the same questions answered twice.

    Newcombe's hybrid score interval for paired data (Statistics in Medicine 17, 1998, method 10):
    Wilson's intervals of both shares, joined with the correlation of the two answers.
    """
    n = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first, only_second = sum(first) - both, sum(second) - both
    neither = n - both - only_first - only_second
    p, q = share(sum(first), n), share(sum(second), n)
    margins = sum(first) * (n - sum(first)) * sum(second) * (n - sum(second))
    phi = 0.0
    if margins:
        excess = float(both * neither - only_first * only_second)
        if excess > 0:
            excess = max(excess - n / 2, 0.0)
        phi = excess / math.sqrt(margins)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a**2 - 2 * phi * a * b + b**2, 0))

    difference = p.value - q.value
    return Estimate(
        difference,
        difference - reach(p.value - p.low, q.high - q.value),
        difference + reach(p.high - p.value, q.value - q.low),
    )


def bootstrap(columns: Sequence[Sequence[float]], statistic: Callable[..., Columns]) -> Estimate:
    """`statistic` of the columns' sums, such as a ratio of two of them.

    The interval is the percentile bootstrap's over rows (questions), from a fixed seed. `statistic`
    takes one array a column, elementwise.
    """
    rows = np.array(columns, dtype=np.float64)  # [columns, n]
    n = rows.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(*rows.sum(axis=1)[:, None])
        samples = statistic(*(counts @ rows.T).T)
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return Estimate(float(value[0]), float(low), float(high))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum."""
    return bootstrap([numerators, denominators], lambda a, b: a / b)


def gain(loss: dict[str, float]) -> str:
    """A loss turned round, in points of 100, with its interval."""
    value, low, high = (0.0 - 100 * loss[key] for key in ("value", "high", "low"))  # never -0.0
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def forwards(tokens_per_forward: dict[str, float]) -> str:
    """How many fewer, or more, forwards than one for each token, with its interval."""
    value, low, high = (tokens_per_forward[key] for key in ("value", "low", "high"))
    if round(value, 2) == 1:
        return f"as many forwards ({1 / high:.2f}x to {1 / low:.2f}x)"
    if value > 1:
        return f"{value:.2f}x fewer forwards ({low:.2f} to {high:.2f})"
    return f"{1 / value:.2f}x more forwards ({1 / high:.2f} to {1 / low:.2f})"
