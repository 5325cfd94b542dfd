"""Requests to a server, streamed, by clients that take little time themselves, and what came of
them. All times are seconds from a beginning that the requests share.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

_MAX_LOADING = 120.0  # seconds
REFUSALS = (429, 503)  # the queue is full, or there is no memory


@dataclass
class Answer:
    """due: when the request was to be sent, from which its times count, whenever it was sent."""

    due: float
    sent: float = 0.0
    status: int = 0  # none came
    chunks: list[float] = field(default_factory=list)  # when text came
    whole: bool = False
    tokens: int = 0
    nfe: int = 0

    @property
    def first(self) -> float:
        return self.chunks[0] - self.due

    @property
    def per_token(self) -> float:
        """Of the tokens behind the first chunk's, which came at once."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.tokens - 1, 1)

    @property
    def total(self) -> float:
        return self.chunks[-1] - self.due


async def ask(port: int, body: dict[str, Any], answer: Answer, begin: float) -> Answer:
    """What comes is written into `answer`, so that it is there too where this is cancelled."""
    body = {"temperature": 0, **body, "stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    answer.sent = time.perf_counter() - begin
    came: list[tuple[float, bytes]] = []
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return answer
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        # Read later, as a client that does more takes its time from the server.
        while piece := await reader.read(1 << 16):
            came.append((time.perf_counter() - begin, piece))
    except OSError:  # it broke off
        return answer
    finally:
        writer.close()
        _read(came, answer)
    if not answer.whole and answer.status not in (0, 200, *REFUSALS):
        raise RuntimeError(f"the server answers {answer.status} to {data[:200]!r}")
    return answer


def _read(came: Sequence[tuple[float, bytes]], answer: Answer) -> None:
    """A stream that came in pieces, each when it did."""
    whole = b"".join(piece for _, piece in came)
    if (status := re.match(rb"HTTP/1.1 (\d+) ", whole)) is None:
        return
    answer.status = int(status[1])
    ends = list(accumulate(len(piece) for _, piece in came))
    begins = [found.start() for found in re.finditer(rb"^data: \{", whole, re.MULTILINE)]
    answer.chunks += [came[bisect_right(ends, begin)][0] for begin in begins]
    answer.whole = re.search(rb"^data: \[DONE\]", whole, re.MULTILINE) is not None
    if answer.whole:
        line = whole[begins[-1] :].partition(b"\n")[0]
        usage = json.loads(line.removeprefix(b"data: "))["usage"]
        answer.tokens = usage["completion_tokens"]
        answer.nfe = usage.get("nfe", answer.tokens)  # llama.cpp's server: a forward for each
        del answer.chunks[-1]  # the usage


def crowd(port: int, bodies: Sequence[dict[str, Any]], clients: int | None = None) -> list[Answer]:
    """By `clients` that ask one request behind the other's answer; without: all at once."""
    begin = time.perf_counter()
    left = iter(bodies)
    answers = []

    async def client() -> None:
        for body in left:
            now = time.perf_counter() - begin
            answers.append(await ask(port, body, Answer(now), begin))

    async def all_of_them() -> None:
        await asyncio.gather(*(client() for _ in range(clients or len(bodies))))

    asyncio.run(all_of_them())
    for answer in answers:
        if not answer.whole:
            raise RuntimeError(f"the server does not answer: status {answer.status}")
    return answers


def ended(answers: Iterable[Answer]) -> float:
    """When the last token came."""
    return max((answer.chunks[-1] for answer in answers if answer.whole), default=0.0)


def tokens_per_forward(answers: Sequence[Answer]) -> float:
    """Of each text: rows of others in the same forward do not count."""
    return sum(each.tokens for each in answers) / max(sum(each.nfe for each in answers), 1)


def serving(path: Path | None, threads: int | None, *options: str) -> AbstractContextManager[int]:
    """Our server's port. Without a path: the demo model."""
    command = [sys.executable, "-m", "sbd_engine", "serve", *options, "--port", "0"]
    command += [] if path is None else ["--model", str(path.absolute())]
    command += [] if threads is None else ["--threads", str(threads)]
    return _running(command, r"serving \S+ at http://127.0.0.1:(\d+)")


def serving_peer(
    server: Path, path: Path, threads: int, slots: int, context: int
) -> AbstractContextManager[int]:
    """The port of llama.cpp's server, which answers so many requests at once, each of `context`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [str(server), "--model", str(path.absolute()), "--host", "127.0.0.1", "--port", port]
    command += ["--threads", str(threads), "--threads-batch", str(threads), "--no-webui"]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
    return _running(command, r"listening on http://127.0.0.1:(\d+)")


@contextmanager
def _running(command: Sequence[str], ready: str) -> Iterator[int]:
    with (
        tempfile.NamedTemporaryFile() as log,  # a pipe would be full some time
        subprocess.Popen(command, stdout=log, stderr=log, cwd="/") as process,
    ):
        try:
            latest = time.monotonic() + _MAX_LOADING
            while not (found := re.search(ready, said(log))):
                if process.poll() is not None or time.monotonic() > latest:
                    raise RuntimeError(f"the server does not start: {said(log).strip()}")
                time.sleep(0.05)
            yield int(found[1])
        finally:
            process.kill()


def said(log: Any) -> str:
    return Path(log.name).read_text(errors="replace")
