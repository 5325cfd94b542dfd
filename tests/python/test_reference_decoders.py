"""The reference decoders and unmasking rules: examples by hand, exact arithmetic, properties."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil, inf
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from reference.decoders import Decoded, ntp_decode, sbd_decode
from reference.random_model import random_model
from reference.script import EOS, SCRIPT_MASK, Script
from reference.stats import RowStats
from reference.unmask import RULES, Rule, choose, entropy_bounds

# The unmasking rules


def candidates(
    entropy: ArrayLike = (), top_prob: ArrayLike = (), margin: ArrayLike = ()
) -> RowStats:
    given = [np.array(values, dtype=np.float64) for values in (entropy, top_prob, margin)]
    none = np.zeros(max(len(values) for values in given))
    h, c, m = (values if len(values) else none for values in given)
    return RowStats(none.astype(np.int64), c, m, none, h, none)


@pytest.mark.parametrize(
    ("gamma", "chosen", "margin"),
    [  # sorted 0, 1/4, 1/2, 3/4; sums before the last element 0, 0, 1/4, 3/4
        (0.0, [1, 2], 0.0),  # a second one only behind an exact zero
        (0.125, [1, 2], 0.125),
        (0.375, [1, 2, 3], 0.125),  # from 1/4
        (0.5, [1, 2, 3], 0.25),  # from 1/4, from 3/4, and 1/4 between the last taken and the next
        (0.875, [0, 1, 2, 3], 0.125),
        (inf, [0, 1, 2, 3], inf),
    ],
)
def test_entropy_bounded_by_hand(gamma: float, chosen: list[int], margin: float) -> None:
    assert choose(candidates([0.75, 0.0, 0.25, 0.5]), Rule(gamma=gamma)) == (chosen, margin)


def test_ties_go_to_the_lower_position() -> None:
    assert choose(candidates([0.5, 0.5, 0.5]), Rule(gamma=0.5)) == ([0, 1], 0.0)
    assert choose(candidates([0.5, 0.5, 0.5]), Rule(gamma=0.0))[0] == [0]
    assert choose(candidates([0.5]), Rule(gamma=0.0)) == ([0], inf)
    many = candidates(top_prob=np.tile([0.25, 0.5], 64))
    assert choose(many, Rule("top_n", top_n=40))[0] == list(range(1, 80, 2))


@pytest.mark.parametrize("proxy", ["confidence", "margin"])
def test_entropy_bounded_by_proxy(proxy: str) -> None:
    # in order of the proxy the entropies are 1/2, 1/4, 1, 1/8: sum - max 0, 1/4, 3/4, 7/8
    values = [0.25, 0.75, 0.125, 0.5]
    stats = candidates(
        [1.0, 0.5, 0.125, 0.25], **{proxy if proxy == "margin" else "top_prob": values}
    )
    for gamma, chosen in ((0.0, [1]), (0.25, [1, 3]), (0.8, [0, 1, 3]), (0.875, [0, 1, 2, 3])):
        assert choose(stats, Rule(gamma=gamma, proxy=proxy))[0] == chosen


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [  # confidences sorted .9, .8, .6, .5; (n + 1)(1 - c_n) = .2, .6, 1.6, 2.5
        (Rule("factor", factor=1.0), [0, 2]),
        (Rule("factor", factor=2.0), [0, 2, 3]),
        (Rule("factor", factor=0.5), [2]),
        (Rule("factor", factor=0.1), [2]),  # at least one
        (Rule("confidence", confidence_threshold=0.7), [0, 2]),
        (Rule("confidence", confidence_threshold=0.6), [0, 2]),  # strictly above
        (Rule("confidence", confidence_threshold=0.95), [2]),  # at least one
        (Rule("top_n", top_n=3), [0, 2, 3]),
        (Rule("top_n", top_n=9), [0, 1, 2, 3]),
    ],
)
def test_confidence_rules_by_hand(rule: Rule, chosen: list[int]) -> None:
    assert choose(candidates(top_prob=[0.8, 0.5, 0.9, 0.6]), rule)[0] == chosen


def random_candidates(rng: np.random.Generator) -> RowStats:
    n = int(rng.integers(1, 17))
    return candidates(rng.exponential(0.3, n), rng.uniform(0, 1, n), rng.uniform(0, 1, n))


def random_rule(rng: np.random.Generator) -> Rule:
    return Rule(
        unmask=str(rng.choice(RULES)),
        gamma=float(rng.exponential(0.5)),
        proxy=str(rng.choice(["entropy", "confidence", "margin"])),
        factor=float(rng.uniform(0, 3)),
        confidence_threshold=float(rng.uniform(0, 1)),
        top_n=int(rng.integers(1, 17)),
    )


def test_entropy_bounds_are_sum_minus_max() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        h = rng.exponential(0.3, 16) * 10.0 ** -rng.integers(0, 20, 16)  # far apart in magnitude
        exact = [Fraction(x) for x in h]
        for s, bound in enumerate(entropy_bounds(h), start=1):
            expected = sum(exact[:s]) - max(exact[:s])
            assert bound == pytest.approx(float(expected), rel=1e-14)
            assert (bound > 0) == (expected > 0)  # nothing slips past gamma = 0


def test_the_margin_of_a_choice_holds() -> None:
    """No change of the statistics that moves every deciding quantity by less alters the choice."""
    rng = np.random.default_rng(1)
    for _ in range(3000):
        stats, rule = random_candidates(rng), random_rule(rng)
        chosen, margin = choose(stats, rule)
        n = len(stats.entropy)
        change = min(margin, 1e3) / (n + 2)  # a sum, or (s + 1)(1 - c), moves by n + 1 times that

        def nudged(values: NDArray[np.float64], by: float = change) -> NDArray[np.float64]:
            return np.maximum(values + rng.uniform(-by, by, len(values)), 0.0)

        moved = replace(
            stats,
            entropy=nudged(stats.entropy),
            top_prob=nudged(stats.top_prob),
            margin=nudged(stats.margin),
        )
        assert choose(moved, rule)[0] == chosen


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="'entropy'"):
        Rule("entropy")
    with pytest.raises(ValueError, match="'surprise'"):
        Rule(proxy="surprise")


# The decoders, on a script of logits


def test_sbd_end_shrinks_to_the_first_eos() -> None:
    m = SCRIPT_MASK
    script = Script(
        # the two surest are an EOS at 3 and a token at 5: end = 4, and 5 stays as context
        [(1, 1), (1, 2), (1, 3), (EOS, 9), (1, 4), (8, 8)],
        # 4 is sure but behind the end; of 0, 1, 2 an EOS at 1 and a token at 2: end = 2
        [(2, 1), (EOS, 5), (2, 4), (2, 1), (2, 9), (2, 1)],
        [(3, 1), (3, 1), (3, 1), (3, 1), (3, 9), (3, 1)],
    )
    decoded = sbd_decode(script, [5, 6], 20, 6, m, {EOS}, unmask="top_n", top_n=2)
    assert decoded[:3] == ([3, EOS], 3, "stop")
    assert [d.positions for d in decoded.trace] == [[5, 7], [3, 4], [2]]
    assert [d.tokens for d in decoded.trace] == [[EOS, 8], [EOS, 2], [3]]
    assert script.seen == [
        ([5, 6, m, m, m, m, m, m], [1, 2, 8, 8, 8, 8, 8, 8]),
        ([5, 6, m, m, m, EOS, m, 8], [1, 2, 8, 8, 8, 8, 8, 8]),
        ([5, 6, m, EOS, 2, EOS, m, 8], [1, 2, 8, 8, 8, 8, 8, 8]),
    ]


def test_sbd_last_block_keeps_its_rows() -> None:
    m = SCRIPT_MASK
    # the last block's surest position is behind the one token wanted
    script = Script([(1, 1), (2, 1), (3, 1)], [(4, 1), (EOS, 9), (EOS, 9)])
    decoded = sbd_decode(script, [5], 4, 3, m, {EOS}, gamma=inf)
    assert decoded[:3] == ([1, 2, 3, 4], 2, "length")
    assert script.seen[1] == ([5, 1, 2, 3, m, m, m], [1, 2, 3, 4, 7, 7, 7])


def test_sbd_eos_as_the_last_token_wanted_stops() -> None:
    script = Script([(1, 1), (EOS, 1), (3, 1)])
    assert sbd_decode(script, [5], 2, 3, SCRIPT_MASK, {EOS}, gamma=inf)[:3] == (
        [1, EOS],
        1,
        "stop",
    )


def test_sbd_rows_end_with_the_context() -> None:
    script = Script([(1, 1), (2, 1), (3, 1)], [(4, 1), (5, 1)])
    decoded = sbd_decode(script, [5], 20, 3, SCRIPT_MASK, {EOS}, gamma=inf, n_ctx=6)
    assert decoded[:3] == ([1, 2, 3, 4, 5], 2, "length")
    assert len(script.seen[1][0]) == 6


def test_sbd_ignores_eos_when_told() -> None:
    script = Script([(1, 1), (EOS, 1), (3, 1)])
    decoded = sbd_decode(script, [5], 3, 3, SCRIPT_MASK, {EOS}, gamma=inf, ignore_eos=True)
    assert decoded[:3] == ([1, EOS, 3], 1, "length")


def test_ntp_ends() -> None:
    def answers() -> Script:
        return Script([(1, 1)], [(2, 3)], [(EOS, 2)], [(3, 1)])

    def decode(script: Script, max_tokens: int = 4, **options: Any) -> tuple[Any, ...]:
        return ntp_decode(script, [5], max_tokens, {EOS}, mask_id=SCRIPT_MASK, **options)[:3]

    assert decode(answers()) == ([1, 2, EOS], 3, "stop")
    assert decode(answers(), ignore_eos=True) == ([1, 2, EOS, 3], 4, "length")
    assert decode(answers(), max_tokens=2) == ([1, 2], 2, "length")
    assert decode(answers(), n_ctx=2) == ([1], 1, "length")
    script = answers()
    decoded = ntp_decode(script, [5], 2, mask_id=SCRIPT_MASK)
    assert script.seen == [([5], [1]), ([5, 1], [1, 2])]
    assert decoded.trace == [([1], [1], 1.0), ([2], [2], 3.0)] and decoded.margin == 1.0
    with pytest.raises(ValueError, match="at most 2 tokens, got 3"):
        ntp_decode(answers(), [1, 2, 3], 1, n_ctx=2)


# The decoders, on random models


@pytest.mark.parametrize("seed", range(0, 24, 5))
def test_sbd_properties(seed: int) -> None:
    model = random_model(seed)
    reference, prompt, mask = model.reference(), model.prompt(9), model.mask_id

    def decode(block_size: int, **rule: Any) -> Decoded:
        decoded = sbd_decode(reference, prompt, 13, block_size, mask, ignore_eos=True, **rule)
        assert len(decoded.tokens) == 13 and mask not in decoded.tokens
        assert decoded.nfe == len(decoded.trace) and all(d.tokens for d in decoded.trace)
        assert sorted(p for d in decoded.trace for p in d.positions) == list(range(9, 22))
        assert all(d.margin >= 0 for d in decoded.trace)
        return decoded

    for block_size in (1, 4, 16):
        single, whole = decode(block_size, gamma=0.0), decode(block_size, gamma=inf)
        assert single.nfe == 13
        assert whole.nfe == ceil(13 / block_size)
        assert decode(block_size, unmask="top_n", top_n=1).nfe == 13
        assert decode(block_size, unmask="top_n", top_n=block_size).tokens == whole.tokens
        assert whole.nfe <= decode(block_size, gamma=0.35).nfe <= 13


@pytest.mark.parametrize("seed", range(2, 24, 7))
def test_decoders_stop_at_an_eos(seed: int) -> None:
    model = random_model(seed)
    reference, prompt, mask = model.reference(), model.prompt(9), model.mask_id
    for block_size in (0, 1, 16):  # 0: NTP

        def decode(eos: list[int], size: int = block_size) -> tuple[list[int], int, str]:
            if size == 0:
                return ntp_decode(reference, prompt, 13, eos, mask_id=mask)[:3]
            return sbd_decode(reference, prompt, 13, size, mask, eos, gamma=0.1)[:3]

        free, _, reason = decode([])
        assert reason == "length"
        eos = free[5]
        tokens, nfe, reason = decode([eos])
        assert reason == "stop" and tokens[-1] == eos and eos not in tokens[:-1]
        if block_size < 2:
            assert tokens == free[: free.index(eos) + 1] and nfe == len(tokens)
