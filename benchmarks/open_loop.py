"""Requests that come when they come, however many are open (an open loop), and what is told of how
they were answered. Clients that wait for their answer before they ask again would ask less the
slower a server is, and so hide how long others would have waited.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from load import REFUSALS, Answer, ask, ended, tokens_per_forward

from sbd_engine.evaluation.questions import read_tasks

MAX_EXAMPLES = 8  # answered questions in front of a prompt's own
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 32, 0.8, 128  # of an answer
PERCENTILES = (50, 90, 99)
GOOD_SHARE = 0.9  # of the requests of a rate that is sustained


class Limits(NamedTuple):
    """Within which an answer is good, in seconds."""

    first: float
    per_token: float

    def hold(self, answer: Answer) -> bool:
        return answer.whole and answer.first <= self.first and answer.per_token <= self.per_token


def requests(decoder: str, seed: int) -> Iterator[dict[str, Any]]:
    """Without end, of mixed lengths, and always the same of one seed."""
    questions = read_tasks(None)
    rng = np.random.default_rng([seed, 0])
    while True:
        *examples, asked = rng.integers(len(questions), size=rng.integers(MAX_EXAMPLES + 1) + 1)
        shown = [f"{questions[n].prompt}{questions[n].answer}\n\n" for n in examples]
        tokens = round(MEDIAN_TOKENS * rng.lognormal(sigma=SPREAD))
        yield {
            "prompt": "".join(shown) + questions[asked].prompt,
            "max_tokens": int(np.clip(tokens, 1, MOST_TOKENS)),
            "ignore_eos": True,
            "decoder": decoder,
        }


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """A Poisson process: waits are exponential. Of one seed the same at every rate, but for their
    scale."""
    rng = np.random.default_rng([seed, 1])
    times: list[float] = []
    now = rng.exponential() / rate
    while now < seconds:
        times.append(now)
        now += rng.exponential() / rate
    return times


def plan(
    decoder: str, rate: float, seconds: float, seed: int
) -> list[tuple[float, dict[str, Any]]]:
    """When each request is due."""
    return list(zip(arrivals(rate, seconds, seed), requests(decoder, seed), strict=False))


async def drive(
    port: int, planned: Sequence[tuple[float, dict[str, Any]]], patience: float
) -> list[Answer]:
    """patience: seconds after the last request, when what is open counts as lost."""
    begin = time.perf_counter()
    answers = [Answer(due) for due, _ in planned]
    asked = []
    for answer, (due, body) in zip(answers, planned, strict=True):
        await asyncio.sleep(due - (time.perf_counter() - begin))
        asked.append(asyncio.create_task(ask(port, body, answer, begin)))
    with suppress(asyncio.TimeoutError):  # those that are open then are cancelled
        await asyncio.wait_for(asyncio.gather(*asked), patience)
    return answers


def figures(rounds: Sequence[Sequence[Answer]], seconds: float, limits: Limits) -> dict[str, Any]:
    """Of all rounds' answers together. Percentiles are those of whole answers, in seconds; the
    others are counted beside them."""
    answers = [answer for each in rounds for answer in each]
    whole = [answer for answer in answers if answer.whole]
    refused = sum(answer.status in REFUSALS for answer in answers)
    took = sum(max(seconds, ended(each)) for each in rounds)
    good = sum(limits.hold(answer) for answer in answers)
    return {
        "requests": len(answers),
        "answered": len(whole),
        "refused": refused,
        "lost": len(answers) - len(whole) - refused,
        "good": good,
        "good_per_s": good / (seconds * len(rounds)),
        "tokens_per_s": sum(answer.tokens for answer in whole) / took,
        "tokens_per_forward": tokens_per_forward(whole),
        "open": sum(answer.total for answer in whole) / took,  # in the mean, by Little's law
        "first": percentiles([answer.first for answer in whole]),
        "per_token": percentiles([answer.per_token for answer in whole if answer.tokens > 1]),
        "total": percentiles([answer.total for answer in whole]),
        "late": percentiles([answer.sent - answer.due for answer in answers]),
    }


def percentiles(values: Sequence[float]) -> list[float] | None:
    return np.percentile(values, PERCENTILES).tolist() if values else None


def sustained(points: Sequence[dict[str, Any]]) -> float | None:
    """The highest rate that was kept up with, and every lower one."""
    highest = None
    for point in sorted(points, key=lambda point: point["rate"]):
        if point["good"] < GOOD_SHARE * point["requests"]:
            break
        highest = point["rate"]
    return highest
