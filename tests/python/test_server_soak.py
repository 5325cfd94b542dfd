"""A crowd of clients, some of whom leave: nothing is left of them. SBD_SOAK_SECONDS=300: longer."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from python.test_cli_serve import serving

openai = pytest.importorskip("openai")

SECONDS = float(os.environ.get("SBD_SOAK_SECONDS", "2"))
CLIENTS = 24  # more than run together
LONG = 60.0  # after so long memory is to be flat


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Crowd:
    """Clients that ask for this and that, one request behind the other; one in five leaves."""

    def __init__(self, url: str, seconds: float, seed: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._end = time.monotonic() + seconds
        self._seed = seed
        self.tokens = self.done = self.left = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._visit(self._seed + each) for each in range(CLIENTS)))
        await self._client.close()

    async def _visit(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self._end:
            asked: dict[str, Any] = {
                "model": "demo",
                "prompt": f"def f{draw.randrange(50)}(x):\n" + "    x += 1\n" * draw.randrange(30),
                "max_tokens": draw.randint(1, 60),
                "temperature": draw.choice([0.0, 0.8]),
                "extra_body": {"ignore_eos": True},
            }
            if draw.random() < 0.5:
                answer = self._client.completions.create(**asked)
                await (self._leave(answer, draw) if draw.random() < 0.2 else self._read(answer))
                continue
            stream = await self._client.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            leaves = draw.random() < 0.2
            async for chunk in stream:
                if leaves:
                    self.left += 1
                    await stream.close()
                    break
                if chunk.usage:
                    self.done += 1
                    self.tokens += chunk.usage.completion_tokens

    async def _read(self, answer: Any) -> None:
        whole = await answer
        self.tokens += whole.usage.completion_tokens
        self.done += 1

    async def _leave(self, answer: Any, draw: random.Random) -> None:
        self.left += 1
        with suppress(asyncio.TimeoutError, openai.APIConnectionError):
            await asyncio.wait_for(answer, draw.random() * 0.05)


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {
        head: float(value)
        for head, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_nothing_is_left_over() -> None:
    # Of the budget a quarter is for what ended texts leave, and full after a while.
    with serving("--kv-budget", "48MiB") as (process, url, _):
        sizes = []
        for seed in range(4):  # to warm up: what the allocator keeps grows for a while
            asyncio.run(Crowd(url, SECONDS / 8, seed).run())
            sizes.append(resident(process.pid) >> 10)
        before = metrics(url)
        size, running, opened = (of(process.pid) for of in (resident, threads, files))
        crowd = Crowd(url, SECONDS / 2, seed=1000)
        asyncio.run(crowd.run())
        assert crowd.done > 0
        assert crowd.left > 0

        deadline = time.monotonic() + 10
        while metrics(url)['sbd_texts_running{model_name="demo"}']:
            assert time.monotonic() < deadline
        now = metrics(url)
        for name in ("texts_running", "texts_waiting", "sequences", "sequences_waiting"):
            assert now[f'sbd_{name}{{model_name="demo"}}'] == 0
        assert now['sbd_kv_used_bytes{model_name="demo"}'] == 0
        new = {name: value - before.get(name, 0.0) for name, value in now.items()}
        ended = new['sbd_texts_total{model_name="demo",outcome="length"}']
        cancelled = new.get('sbd_texts_total{model_name="demo",outcome="cancelled"}', 0)
        # Whoever left may have had the answer by then, or not yet a turn.
        assert crowd.done <= ended <= crowd.done + crowd.left
        assert cancelled <= crowd.left
        assert 'sbd_texts_total{model_name="demo",outcome="error"}' not in now
        assert new['sbd_request_seconds_count{model_name="demo"}'] == ended + cancelled
        assert new['sbd_completion_tokens_total{model_name="demo"}'] >= crowd.tokens
        assert threads(process.pid) <= running + 2  # of the pool that tokenizes
        assert files(process.pid) <= opened + 2
        growth = resident(process.pid) / size
        print(f"{crowd.done} done, {crowd.left} left, {crowd.tokens} tokens")
        print(f"memory: {sizes} KiB while warming up, then x {growth:.3f}")
        if SECONDS >= LONG:
            assert growth < 1.02
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
