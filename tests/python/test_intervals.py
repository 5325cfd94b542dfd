"""The 95 % intervals, against published figures and against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from sbd_engine.evaluation.intervals import bootstrap, forwards, paired_difference, ratio, share


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), score method
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (28, 29, 0.8282, 0.9939),
    ],
)
def test_share(successes: int, n: int, low: float, high: float) -> None:
    estimate = share(successes, n)
    assert estimate.value == successes / n
    assert estimate.low == pytest.approx(low, abs=6e-5)
    assert estimate.high == pytest.approx(high, abs=6e-5)


def test_a_share_stays_between_its_ends() -> None:
    for n in (1, 7, 1000):
        for successes in (0, 1, n):
            low, high = share(successes, n)[1:]
            assert 0 <= low <= successes / n <= high <= 1


def answers(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    one = [True] * (both + first) + [False] * (second + neither)
    other = [True] * both + [False] * first + [True] * second + [False] * neither
    return one, other


def test_paired_difference() -> None:
    difference = paired_difference(*answers(36, 12, 2, 0))  # Newcombe's method 10, same volume
    assert difference.value == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.0569, abs=6e-5)
    assert difference.high == pytest.approx(0.3404, abs=6e-5)
    there = paired_difference(*answers(50, 9, 3, 38))
    back = paired_difference(*answers(50, 3, 9, 38))
    assert there == pytest.approx((-back.value, -back.high, -back.low))


def test_no_difference_is_known_better_with_more_questions() -> None:
    few, many = (
        paired_difference(*answers(90, 0, 0, 10)),
        paired_difference(*answers(900, 0, 0, 100)),
    )
    assert few.value == many.value == 0
    assert 0 < many.high < few.high < 0.05
    assert paired_difference([True], [True]).high < 1


def test_paired_difference_covers() -> None:
    """Simulated: of intervals at 95 %, about that share holds the truth (0.9 - 0.85)."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(1000):
        first = rng.random(150) < 0.9
        # Right where the first is, but for some: an average of 0.85 of all.
        second = np.where(first, rng.random(150) < 0.92, rng.random(150) < 0.22)
        low, high = paired_difference(first.tolist(), second.tolist())[1:]
        held += low <= 0.05 <= high
    assert 930 <= held <= 985


def test_ratio() -> None:
    assert ratio([8, 12, 4], [2, 3, 1]) == pytest.approx((4, 4, 4))  # every row says four
    rng = np.random.default_rng(5)
    steps = rng.integers(1, 9, size=400).astype(float)
    tokens = 3 * steps + rng.normal(0, 2, size=400)
    estimate = ratio(tokens.tolist(), steps.tolist())
    assert estimate.value == pytest.approx(tokens.sum() / steps.sum())
    # The delta method's interval, which is another way to it.
    error = np.sqrt(((tokens - estimate.value * steps) ** 2).sum()) / steps.sum()
    assert estimate.low == pytest.approx(estimate.value - 1.96 * error, abs=0.2 * error)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * error, abs=0.2 * error)
    assert estimate == ratio(tokens.tolist(), steps.tolist())  # the same each time


def test_bootstrap_passes_sums() -> None:
    estimate = bootstrap([[1, 2, 3], [1, 1, 1]], lambda a, b: a * b)
    assert estimate.value == 18


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (3.07, 3.01, 3.12, "3.07x fewer forwards (3.01 to 3.12)"),
        (1.05, 0.98, 1.11, "1.05x fewer forwards (0.98 to 1.11)"),
        (0.8, 0.5, 1.25, "1.25x more forwards (0.80 to 2.00)"),
        (1.004, 0.8, 1.25, "as many forwards (0.80x to 1.25x)"),
        (0.996, 0.8, 1.25, "as many forwards (0.80x to 1.25x)"),
    ],
)
def test_fewer_or_more_forwards(value: float, low: float, high: float, said: str) -> None:
    assert forwards({"value": value, "low": low, "high": high}) == said
