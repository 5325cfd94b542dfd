"""A crowd of clients, of whom some leave, send half a request, read slowly or are stopped: nothing
is left of them. SBD_SOAK_SECONDS=3600: an hour."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from python.serving import until
from python.test_cli_serve import serving

openai = pytest.importorskip("openai")

SECONDS = float(os.environ.get("SBD_SOAK_SECONDS", "2"))
CLIENTS = 24  # more than run together
LONG = SECONDS >= 60  # after so long memory is to be flat
RUDE = 2 if LONG else 1  # of each kind, besides
# How long they keep the server waiting; in a long run beyond its patience.
PAUSES = (0.0, 0.02, 0.05, min(SECONDS / 40, 40.0))

STOPPED = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as server:
    server.sendall(sys.stdin.buffer.read())
    while server.recv(100):
        print(flush=True)
"""


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Crowd:
    """Clients that ask for this and that, one request behind the other; one in five leaves. left:
    also whoever may have had no answer for another reason."""

    def __init__(self, url: str, seconds: float, seed: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._port = int(url.rpartition(":")[2])
        self._end = time.monotonic() + seconds
        self._seed = seed
        self.tokens = self.done = self.left = self.halves = self.slow = self.stopped = 0

    async def run(self) -> None:
        kinds = CLIENTS * [self._visit]
        kinds += RUDE * [self._send_half, self._read_slowly, self._be_stopped]
        await asyncio.gather(*(kind(self._seed + n) for n, kind in enumerate(kinds)))
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

    def _turns(self) -> Iterator[None]:
        """One at least."""
        yield
        while time.monotonic() < self._end:
            yield

    async def _send_half(self, seed: int) -> None:
        draw = random.Random(seed)
        for _ in self._turns():
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
            whole = long_request()
            writer.write(whole[: draw.randrange(len(whole))])
            await self._pause(draw)
            writer.close()
            self.halves += 1

    async def _read_slowly(self, seed: int) -> None:
        draw = random.Random(seed)
        for _ in self._turns():
            self.left += 1
            with socket.socket() as own:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the rest waits there
                own.connect(("127.0.0.1", self._port))
                reader, writer = await asyncio.open_connection(sock=own, limit=1024)
                writer.write(long_request())
                for _ in range(draw.randint(1, 10)):
                    await reader.read(1024)
                    await self._pause(draw)
                writer.close()
            self.slow += 1

    async def _be_stopped(self, seed: int) -> None:
        """In its midst, and killed then or let go on."""
        draw = random.Random(seed)
        for _ in self._turns():
            self.left += 1
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-IS", "-c", STOPPED, str(self._port)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdin and process.stdout
            process.stdin.write(long_request())
            process.stdin.close()
            await process.stdout.readline()
            with suppress(ProcessLookupError):  # it has had its answer
                process.send_signal(signal.SIGSTOP)
                await self._pause(draw)
                process.send_signal(draw.choice([signal.SIGKILL, signal.SIGCONT]))
            await process.communicate()
            self.stopped += 1

    async def _pause(self, draw: random.Random) -> None:
        left = max(self._end - time.monotonic(), 0.0)
        await asyncio.sleep(min(draw.choice(PAUSES), left))


def long_request() -> bytes:
    """Its answer has a megabyte in a long run."""
    asked = {"prompt": "x", "max_tokens": 400 if LONG else 40, "ignore_eos": True}
    body = json.dumps({**asked, "logprobs": 20, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n{body}".encode()


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

        def left_over() -> dict[str, float]:
            now = metrics(url)
            names = ("texts_running", "texts_waiting", "sequences", "sequences_waiting")
            found = {name: now[f'sbd_{name}{{model_name="demo"}}'] for name in names}
            found["kv_used_bytes"] = now['sbd_kv_used_bytes{model_name="demo"}']
            found["threads"] = max(threads(process.pid) - running - 2, 0)  # a pool tokenizes
            found["files"] = max(files(process.pid) - opened - 2, 0)
            return {name: value for name, value in found.items() if value}

        with suppress(AssertionError):
            until(lambda: not left_over())
        assert not left_over()
        now = metrics(url)
        new = {name: value - before.get(name, 0.0) for name, value in now.items()}
        ended = new['sbd_texts_total{model_name="demo",outcome="length"}']
        cancelled = new.get('sbd_texts_total{model_name="demo",outcome="cancelled"}', 0)
        # Whoever left may have had the answer by then, or not yet a turn.
        assert crowd.done <= ended <= crowd.done + crowd.left
        assert cancelled <= crowd.left
        assert 'sbd_texts_total{model_name="demo",outcome="error"}' not in now
        assert new['sbd_request_seconds_count{model_name="demo"}'] == ended + cancelled
        assert new['sbd_completion_tokens_total{model_name="demo"}'] >= crowd.tokens
        growth = resident(process.pid) / size
        print(f"{crowd.done} done, {crowd.left} left or may have, {crowd.tokens} tokens")
        print(
            f"{crowd.halves} half requests, {crowd.slow} slow and {crowd.stopped} stopped readers"
        )
        print(f"memory: {sizes} KiB while warming up, then x {growth:.3f}")
        if LONG:
            assert growth < 1.05  # 5 MiB: what an hour leaks, or a minute scatters
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
