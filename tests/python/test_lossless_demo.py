"""Lossless decoding of the demo model: next-token decoding's text, question by question."""

from __future__ import annotations

from sbd_engine import Engine
from sbd_engine.evaluation.questions import read_tasks

GAMMAS = (0.0, 0.003, 0.1, 1.5, float("inf"))


def test_five_hundred_questions() -> None:
    prompts = [question.prompt for question in read_tasks(None)][::2][:500]
    assert len(prompts) == 500
    with Engine() as engine:
        expected = engine.generate_batch([{"prompt": p, "decoder": "ntp"} for p in prompts])
        for gamma in GAMMAS:
            actual = engine.generate_batch(
                [
                    {"prompt": p, "decoder": "sbd_lossless", "gamma": gamma, "block_size": 8}
                    for p in prompts
                ]
            )
            for prompt, one, other in zip(prompts, actual, expected, strict=True):
                assert one.tokens == other.tokens, (gamma, prompt)
                assert one.finish_reason == other.finish_reason, (gamma, prompt)
            nfe = sum(one.stats.nfe for one in actual)
            assert gamma < 0.1 or nfe < sum(len(one.tokens) for one in expected) / 2
