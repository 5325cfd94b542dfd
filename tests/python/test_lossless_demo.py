"""Lossless decoding of the demo model: next-token decoding's text, question by question."""

from __future__ import annotations

import os

import pytest

from sbd_engine import Engine, _core
from sbd_engine.evaluation.questions import read_tasks

GAMMAS = (0.0, 0.003, 0.1, 1.5, float("inf"))
EVERY_GAMMA = "SBD_EVERY_GAMMA" in os.environ  # for every question, else one for each in turn


def test_five_hundred_questions() -> None:
    prompts = [question.prompt for question in read_tasks(None)][::2][:500]
    assert len(prompts) == 500
    with Engine() as engine:
        expected = engine.generate_batch([{"prompt": p, "decoder": "ntp"} for p in prompts])
        for i, gamma in enumerate(GAMMAS):
            asked = slice(None) if EVERY_GAMMA else slice(i, None, len(GAMMAS))
            actual = engine.generate_batch(
                [
                    {"prompt": p, "decoder": "sbd_lossless", "gamma": gamma, "block_size": 8}
                    for p in prompts[asked]
                ]
            )
            for prompt, one, other in zip(prompts[asked], actual, expected[asked], strict=True):
                assert one.tokens == other.tokens, (gamma, prompt)
                assert one.finish_reason == other.finish_reason, (gamma, prompt)
            nfe = sum(one.stats.nfe for one in actual)
            assert gamma < 0.1 or nfe < sum(len(one.tokens) for one in expected[asked]) / 2


def test_statistics_count_drafts_and_forwards() -> None:
    prompt = read_tasks(None)[0].prompt
    with Engine() as engine:
        done = engine.generate(prompt, decoder="sbd_lossless", block_size=8, gamma=float("inf"))
        stats = done.stats
        assert stats.drafts is not None and stats.forwards is not None
        assert stats.nfe == sum(stats.forwards.values())
        verifying = stats.forwards["verify_and_draft"] + stats.forwards.get("verify", 0)
        assert 0 < stats.drafts.verified <= verifying
        assert 0 < stats.drafts.accepted <= stats.drafts.guesses <= 7 * stats.drafts.verified
        assert done.as_dict()["stats"]["drafts"]["guesses"] == stats.drafts.guesses
        one = engine.generate(prompt, decoder="sbd_lossless", block_size=1).stats
        assert one.drafts == (0, 0, 0) and one.forwards == {"next_token": one.nfe}
        ntp = engine.generate(prompt, decoder="ntp").stats
        assert ntp.drafts is None and ntp.forwards is None


def test_the_best_draft_by_times_of_forwards() -> None:
    """Where rows cost nothing, a block of 32 in every forward; where nothing agrees, none."""
    free = dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 5.0)
    assert _core.best_lossless(free, 1.0) == (32, False, False, 32.0)
    assert _core.best_lossless(free, 0.0) == (1, False, False, 1.0)
    # Some rows cost nothing: a draft behind every outcome, of a few guesses that may be wrong.
    cheap = {**dict.fromkeys((1, 2, 4, 8, 16), 5.0), 32: 50.0}
    size, alone, every, speedup = _core.best_lossless(cheap, 0.5)
    assert (size, alone, every) == (3, False, True) and speedup == pytest.approx(1.75)
    # A row costs as much as the first: a draft needs two rows for a token.
    dear = {rows: float(rows) for rows in free}
    assert _core.best_lossless(dear, 1.0)[0] == 1
