"""Requests to an engine: arguments of any type and size. Others meet none of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from json_mutations import ODD
from rounds import fuzz

from sbd_engine import Engine, SbdError, _core

EVERY = 50  # rounds: then a plain request is answered as ever
ENGINE = Engine(n_threads=1, n_ctx=192, kv_budget=64 << 20)
VOCABULARY: int = ENGINE.model_config["vocab_size"]
PLAIN: dict[str, Any] = {"prompt": "def add(a, b):", "max_tokens": 8}
EXPECTED = ENGINE.generate(**PLAIN)

STRANGE: tuple[Any, ...] = (
    *ODD,
    *(10**400, -(10**400), "a" * 3_000_000, [10**5000], b"bytes", object(), (), {1, 2}),
    *(np.float32("nan"), np.int64(3), np.zeros(3), np.arange(5), range(10**9), iter("ab")),
    *(
        ["a"] * 2000,
        ["a" * 20_000],
        dict.fromkeys(range(20000), 1.0),
        {"1": 2},
        {-1: 0},
        {2**31: 1},
    ),
    *("\x1b[2Jerror:", "\nerror: none", "\u202eevil", "\udcff", [[]] * 1000),
)
PROMPTS: tuple[Any, ...] = (
    *("def add(a, b):", "x", " " * 500, "a\0b", "é🙂", "def f():\n" * 30, "<|endoftext|>" * 9),
    *([1, 2, 3], [0] * 191, [0] * 192, [VOCABULARY - 1], [VOCABULARY], np.arange(4), " " * 10**6),
)
GOOD: dict[str, Callable[[Random], Any]] = {
    "max_tokens": lambda random: random.choice((1, 2, 20, 191, 2**31 - 1)),
    "decoder": lambda random: random.choice(("auto", "ntp", "sbd", "sbd_lossless", "d2f", "dmtd")),
    "block_size": lambda random: random.choice((1, 4, 16, 192, 1024, 100_000)),
    "temperature": lambda random: random.choice((0.0, 0.7, 1e-30, 1e30, 5)),
    "top_p": lambda random: random.choice((1.0, 0.5, 1e-30)),
    "top_k": lambda random: random.choice((0, 1, 5, 2**31 - 1)),
    "min_p": lambda random: random.choice((0.0, 0.1, 1.0)),
    "seed": lambda random: random.choice((0, 2**64 - 1)),
    "sample_index": lambda random: random.choice((0, 2**64 - 1)),
    "stop": lambda random: random.choice(("\n", ["a", "b"], ["return"] * 1024, "é")),
    "ignore_eos": lambda random: random.choice((True, False)),
    "logprobs": lambda random: random.choice((0, 3, 20)),
    "repetition_penalty": lambda random: random.choice((1.0, 1.3, 1e-30, 1e30)),
    "presence_penalty": lambda random: random.choice((0.0, 2.0, -2.0)),
    "frequency_penalty": lambda random: random.choice((0.0, 2.0, -2.0)),
    "logit_bias": lambda random: random.choice(
        ({1: -100}, dict.fromkeys(range(VOCABULARY), 100.0), {3: 3.4e38}, {0: -3.4e38}, {})
    ),
}
NAMES = [*GOOD, *(option.name for option in _core.OPTIONS)]


def arguments(random: Random) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": random.choice(PROMPTS), "max_tokens": random.choice((2, 9))}
    for name in random.sample(NAMES, random.choice((0, 1, 2, 4))):
        odd = random.random() < 0.4 or name not in GOOD
        asked[name] = random.choice(STRANGE) if odd else GOOD[name](random)
    if random.random() < 0.05:
        asked["prompt"] = random.choice(STRANGE)
        if isinstance(asked["prompt"], range):  # a caller's own memory
            asked["prompt"] = [0]
    if random.random() < 0.03:
        asked[random.choice(("tempreature", "\x1b[2J", "n" * 100_000))] = 1
    return asked


async def asynchronous(asked: dict[str, Any], take: int) -> None:
    async with ENGINE.astream(**asked) as stream:
        async for _ in stream:
            take -= 1
            if take == 0:
                break


def call(random: Random) -> None:
    asked = arguments(random)
    kind = random.randrange(7)
    if kind <= 1:
        ENGINE.generate(**asked)
    elif kind == 2:
        with ENGINE.stream(**asked) as stream:
            for _ in range(random.randrange(4)):
                next(stream, None)
        str(stream.completion)
    elif kind == 3:
        ENGINE.generate_batch([asked, PLAIN, random.choice((PLAIN, arguments(random)))])
    elif kind == 4:
        asyncio.run(asynchronous(asked, random.randrange(4)))
    elif kind == 5:
        prompt = random.choice((*PROMPTS, *STRANGE[:30]))
        ENGINE.score(prompt, top=random.choice((0, 3, VOCABULARY, VOCABULARY + 1)))
    else:
        ENGINE.resolve(**{name: value for name, value in asked.items() if name != "prompt"})


def one(random: Random) -> None:
    try:
        call(random)
    finally:
        if ENGINE._core.n_sequences != 0:
            raise AssertionError(f"{ENGINE._core.n_sequences} sequences are still alive")
        if random.randrange(EVERY) == 0:
            completion = ENGINE.generate(**PLAIN)
            if completion.tokens != EXPECTED.tokens:
                raise AssertionError(f"{completion.text!r}, expected {EXPECTED.text!r}")


if __name__ == "__main__":
    sys.exit(fuzz(one, (SbdError,)))
