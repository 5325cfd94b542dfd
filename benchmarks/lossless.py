"""What lossless decoding, left to choose how far ahead it drafts, gains over next-token decoding,
whose text it gives: with each model, alone and in batches, the same questions by both in turn; and
how much of its drafts is kept, by temperature. Real time, in one run.

Next-token decoding stands beside itself too: what it seems to gain is the machine's noise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import numpy as np
from options import DOCS, Parser, at_least, integers, run
from page import Table, page, print_table, write_docs

from sbd_engine import Completion, Engine
from sbd_engine.evaluation.questions import read_tasks

NTP: dict[str, Any] = {"decoder": "ntp"}
LOSSLESS: dict[str, Any] = {"decoder": "sbd_lossless"}
TEMPERATURES = (0.0, 0.4, 0.7, 1.0, 1.2)
BLOCK_SIZE = 16  # of the drafts that are looked at by temperature
MAX_TOKENS = 64


def main() -> None:
    parser = Parser(__doc__ or "", rounds=40)
    parser.add_argument(
        "--models", type=Path, nargs="*", help="model files; without: the demo model"
    )
    parser.add_argument("--batch", type=integers(1), default="1,4,16", help="questions at once")
    parser.add_argument("--blocks", type=integers(2), default="4,8,16", help="sizes kept to")
    parser.add_argument("--prompts", type=at_least(1), default=200, help="of each temperature")
    args = parser.parse_args()
    prompts = shuffled_prompts()
    speeds = []
    for path in args.models or [None]:
        with Engine(path, n_threads=args.threads) as engine:
            for batch in args.batch:
                name = path.name if path else "the demo model"
                speeds.append({"model": name, "batch": batch})
                speeds[-1] |= measure_speed(engine, prompts, batch, args.rounds, args.blocks)
                print(json.dumps(speeds[-1]), file=sys.stderr, flush=True)
            device = engine.device
    with Engine(n_threads=args.threads) as engine:
        kept = [measure_kept(engine, prompts[: args.prompts], t) for t in TEMPERATURES]
    report = {"device": device, "threads": args.threads, "speeds": speeds, "kept": kept}
    file = args.work_dir / "lossless.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    for each in tables(report):
        print_table(each)
    print(f"wrote {file}", file=sys.stderr)
    if args.write_docs:
        write_docs(DOCS / "performance.md", "lossless", docs_section(report))


def shuffled_prompts() -> list[str]:
    prompts = [question.prompt for question in read_tasks(None)]
    np.random.default_rng(0).shuffle(prompts)
    return prompts


def measure_speed(
    engine: Engine, prompts: Sequence[str], batch: int, rounds: int, blocks: Sequence[int]
) -> dict[str, Any]:
    """Over NTP's speed, the median of the rounds and two standard errors of it."""
    ways: dict[str, dict[str, Any]] = {"ntp": NTP, "ntp again": NTP, "chosen": LOSSLESS}
    ways |= {str(size): {**LOSSLESS, "block_size": size} for size in blocks}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    done: dict[str, list[Completion]] = {}
    forwards = tokens = 0
    names = list(ways)
    for n in range(rounds):
        asked = [prompts[(n * batch + i) % len(prompts)] for i in range(batch)]
        for name in names[n % len(names) :] + names[: n % len(names)]:
            started = time.perf_counter()
            done[name] = engine.generate_batch(asked, max_tokens=MAX_TOKENS, **ways[name])
            seconds[name].append(time.perf_counter() - started)
        for name in names[1:]:
            if [c.tokens for c in done[name]] != [c.tokens for c in done["ntp"]]:
                raise RuntimeError(f"{name}: another text than next-token decoding's")
        forwards += sum(c.stats.nfe for c in done["chosen"])
        tokens += sum(len(c.tokens) for c in done["chosen"])
    gains = {
        name: np.divide(seconds["ntp"], seconds[name]).tolist() for name in names if name != "ntp"
    }
    return {
        "ntp_tokens_per_s": tokens / sum(seconds["ntp"]),
        "tokens_per_forward": tokens / forwards,
        "gain": {name: median(of) for name, of in gains.items()},
        "error": {name: 2 * 1.25 * pstdev(of) / rounds**0.5 for name, of in gains.items()},
    }


def measure_kept(engine: Engine, prompts: Sequence[str], temperature: float) -> dict[str, float]:
    """Of drafts in blocks of one size: their text is checked to be NTP's."""
    calls = [
        {"prompt": prompt, "temperature": temperature, "seed": seed, "max_tokens": MAX_TOKENS}
        for seed, prompt in enumerate(prompts)
    ]
    expected = engine.generate_batch([{**call, **NTP} for call in calls])
    fixed = {**LOSSLESS, "block_size": BLOCK_SIZE}
    done = engine.generate_batch([{**call, **fixed} for call in calls])
    if [c.tokens for c in done] != [c.tokens for c in expected]:
        raise RuntimeError("another text than next-token decoding's")
    drafts = [c.stats.drafts for c in done if c.stats.drafts is not None]
    return {
        "temperature": temperature,
        "guesses_kept": sum(d.accepted for d in drafts) / sum(d.guesses for d in drafts),
        "tokens_per_forward": sum(len(c.tokens) for c in done) / sum(c.stats.nfe for c in done),
    }


def tables(report: dict[str, Any]) -> list[Table]:
    ways = list(report["speeds"][0]["gain"])
    speeds = [
        [
            each["model"],
            str(each["batch"]),
            f"{each['ntp_tokens_per_s']:.0f}",
            *(f"{each['gain'][way]:.2f} ± {each['error'][way]:.2f}" for way in ways),
            f"{each['tokens_per_forward']:.2f}",
        ]
        for each in report["speeds"]
    ]
    kept = [
        [f"{of['temperature']}", f"{of['guesses_kept']:.1%}", f"{of['tokens_per_forward']:.2f}"]
        for of in report["kept"]
    ]
    heads = [f"blocks of {way}" if way.isdigit() else way for way in ways]
    return [
        Table(
            f"Speed over next-token decoding's: {report['device']}, {report['threads']} threads",
            ["model", "batch", "ntp tok/s", *heads, "tok/forward, chosen"],
            speeds,
        ),
        Table(
            f"Drafts of {BLOCK_SIZE} by the demo model, by temperature",
            ["temperature", "guesses kept", "tok/forward"],
            kept,
        ),
    ]


def docs_section(report: dict[str, Any]) -> str:
    return page([part for each in tables(report) for part in (f"{each.title}.", each)])


if __name__ == "__main__":
    run(main)
