"""What decides the figures of a server under load: when requests are sent, which, whatever has been
answered, and what is told of answers, refusals and losses."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python.serving import serve

from sbd_engine import Engine

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import serving_load
from load import Answer, crowd, ended
from load_page import docs_section
from open_loop import Limits, arrivals, drive, figures, plan, requests, sustained

# The plan


def test_arrivals_are_a_poisson_process_of_a_seed() -> None:
    times = arrivals(50.0, 100.0, seed=3)
    assert times == arrivals(50.0, 100.0, seed=3) != arrivals(50.0, 100.0, seed=4)
    assert times == sorted(times) and times[-1] < 100.0
    assert len(times) == pytest.approx(5000, abs=4 * 5000**0.5)
    waits = np.diff(times)
    assert np.std(waits) / np.mean(waits) == pytest.approx(1, abs=0.1)  # 0 of a steady stream
    assert np.mean(waits > 0.02) == pytest.approx(np.exp(-1), abs=0.05)
    half = arrivals(25.0, 200.0, seed=3)
    assert half == pytest.approx([2 * time for time in times])


def test_requests_are_mixed_and_of_a_seed() -> None:
    some = list(islice(requests("ntp", seed=1), 200))
    assert some == list(islice(requests("ntp", seed=1), 200))
    assert some != list(islice(requests("ntp", seed=2), 200))
    other = list(islice(requests("sbd", seed=1), 200))
    assert other == [{**body, "decoder": "sbd"} for body in some]
    tokens = [body["max_tokens"] for body in some]
    assert 1 <= min(tokens) < 12 and 100 < max(tokens) <= 128
    assert np.median(tokens) == pytest.approx(32, abs=6)
    lengths = [len(body["prompt"]) for body in some]
    assert max(lengths) > 8 * min(lengths)
    assert [body for _, body in plan("ntp", 10.0, 5.0, seed=1)] == some[: len(arrivals(10.0, 5, 1))]


# Sending

STREAM = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNK = b'data: {"choices": [{"text": "a"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 2, "nfe": 1}}\n\n'
SCRIPTS = {
    b"whole": STREAM + CHUNK + CHUNK + USAGE + b"data: [DONE]\n\n",
    b"breaks": STREAM + CHUNK,
    b"fails": STREAM + CHUNK + b'data: {"error": {"message": "no"}}\n\n',
    b"full": b"HTTP/1.1 429 Too Many Requests\r\n\r\n",
    b"drains": b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
    b"silent": b"",
    b"wrong": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


def driven(prompts: list[str], patience: float, step: float = 0.0) -> list[Answer]:
    """By a server that answers nobody before all have asked, and then each as it says."""

    async def all_of_it() -> list[Answer]:
        asked, everybody = 0, asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"}}")
            asked += 1
            if asked == len(prompts):
                everybody.set()
            await everybody.wait()
            if b'"hangs"' in body:
                await reader.read()  # until the client goes
            writer.write(next((said for name, said in SCRIPTS.items() if name in body), b""))
            writer.close()

        async with await asyncio.start_server(handler, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            planned = [(step * n, {"prompt": prompt}) for n, prompt in enumerate(prompts)]
            return await drive(port, planned, patience)

    return asyncio.run(all_of_it())


def test_a_slow_server_is_asked_no_less() -> None:
    answers = driven(["whole", "whole", "whole"], patience=60, step=0.03)
    assert all(answer.whole for answer in answers)
    assert [answer.due for answer in answers] == pytest.approx([0, 0.03, 0.06])
    assert all(answer.sent >= answer.due for answer in answers)
    first = answers[0]  # it waited for the others: this counts
    assert first.first >= 0.06 - 1e-3
    assert (first.tokens, first.nfe, len(first.chunks)) == (2, 1, 2)


def test_what_is_refused_and_lost_is_counted() -> None:
    prompts = ["whole", "breaks", "fails", "full", "drains", "silent", "full"]
    told = figures([driven(prompts, patience=60)], 1.0, Limits(60, 60))
    assert told["requests"] == len(prompts)
    assert (told["answered"], told["refused"], told["lost"], told["good"]) == (1, 3, 3, 1)
    assert told["tokens_per_forward"] == 2.0


def test_what_takes_too_long_is_lost() -> None:
    told = figures([driven(["hangs", "hangs"], patience=0.05)], 1.0, Limits(60, 60))
    assert (told["requests"], told["lost"], told["first"]) == (2, 2, None)


def test_nobody_there_is_a_loss() -> None:
    answers = asyncio.run(drive(1, [(0.0, {"prompt": "x"})], 60))  # nothing listens at port 1
    assert [(answer.status, answer.whole) for answer in answers] == [(0, False)]


def test_a_wrong_request_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="answers 400 to .*wrong"):
        driven(["wrong"], patience=60)


def test_the_server_itself() -> None:
    with Engine() as engine, serve(engine) as served:
        answers = crowd(served.port, list(islice(requests("ntp", seed=0), 2)), clients=1)
        assert [answer.tokens for answer in answers] == [
            body["max_tokens"] for body in islice(requests("ntp", seed=0), 2)
        ]
        assert answers[0].nfe == answers[0].tokens >= len(answers[0].chunks)
        assert answers[1].due >= answers[0].chunks[-1]  # it waited


# What is told


def answer(due: float, chunks: list[float], tokens: int, sent: float | None = None) -> Answer:
    return Answer(due, due if sent is None else sent, 200, chunks, True, tokens, tokens)


def test_figures_by_hand() -> None:
    rounds = [
        [
            answer(1.0, [1.5, 2.5], 11),  # 0.5 s, then 0.1 s each
            answer(2.0, [6.0], 1, sent=5.5),  # sent late: 4 s all the same
            Answer(3.0, 3.0, 429),
        ],
        [answer(0.0, [0.25, 20.25], 41), Answer(1.0, 1.0, 200, [2.0])],
    ]
    told = figures(rounds, 10.0, Limits(first=1.0, per_token=0.2))
    assert ended(rounds[1]) == 20.25
    assert told["requests"] == 5 and told["answered"] == 3
    assert told["refused"] == told["lost"] == 1
    assert told["good"] == 1  # the last one takes 0.5 s per token
    assert told["good_per_s"] == 1 / 20
    assert told["tokens_per_s"] == pytest.approx(53 / (10 + 20.25))
    assert told["first"][0] == 0.5 and told["first"][1] == pytest.approx(0.8 * 4 + 0.2 * 0.5)
    assert told["per_token"][0] == pytest.approx(0.3)  # of 0.1 and 0.5
    assert told["total"][0] == 4.0
    assert told["open"] == pytest.approx((1.5 + 4 + 20.25) / 30.25)
    assert told["late"][0] == 0


def test_a_rate_is_sustained_where_all_lower_ones_are() -> None:
    def point(rate: float, good: int) -> dict[str, Any]:
        return {"rate": rate, "requests": 100, "good": good}

    assert sustained([point(4, 90), point(2, 100), point(8, 89), point(16, 95)]) == 4
    assert sustained([point(2, 50)]) is None


def test_the_page() -> None:
    limits = Limits(1.0, 0.1)
    lines = [
        {"rate": rate, "decoder": "ntp", **figures([[each]], 10.0, limits)}
        for rate, each in ((2.0, answer(0, [0.5, 1.5], 11)), (4.5, Answer(0.0, 0.0, 503)))
    ]
    waiting = {"clients": 1, "decoder": "ntp", "requests_per_s": 2.04, "tokens_per_s": 60.6}
    report = {"model": "m", "threads": 2, "rounds": 1, "seed": 0, "seconds": 10, "open": lines}
    report |= {"waiting": [{**waiting, "tokens_per_forward": 1.0}], "limits": limits._asdict()}
    section = docs_section(report)
    assert "| 1 | ntp | 2.0 | 61 | 1.00 |" in section
    assert "| 2 | ntp | 1 | 0 | 0 | 0.1 | 1 | 1.00 |" in section
    assert "| 4.5 | ntp | 1 | 1 | 0 | 0.0 | 0 | 0.00 |" in section
    assert "| 2 | ntp | 500 / 500 / 500 | 100.0 / 100.0 / 100.0 | 1.50 / 1.50 / 1.50 |" in section
    assert "| 4.5 | ntp | - | - | - |" in section
    assert "ntp 2/s" in section


def test_rates_are_numbers_in_order() -> None:
    assert serving_load.rates("8,0.5,2") == [0.5, 2, 8]
    for text in ("0", "-1,2", "nan", "fast", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"got {text!r}")):
            serving_load.rates(text)
