"""What a constraint costs, and what it saves.

    python benchmarks/grammars.py [MODEL] [--rounds N]

A pattern that allows every text takes nothing away, so its tokens per second beside those of no
constraint are what masks cost. Of JSON, forwards per token beside those of free text: what is
forced takes none. Without MODEL: the demo model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from sbd_engine import Completion, Engine

ANYTHING = "(?s:.*)"
RECORD = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "pattern": "^[a-z]+$"},
        "color": {"enum": ["red", "green", "blue", "black", "white", "yellow"]},
        "price": {"type": "integer", "minimum": 0, "maximum": 999},
        "stock": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["item", "color", "price", "stock"],
    "additionalProperties": False,
    # As the demo model has learned them.
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}
PROMPTS = [
    f"JSON: The {color} {item} costs {price} dollars, and {stock} are in stock.\n"
    for color, item, price, stock in (
        *(("red", "lamp", 35, 12), ("blue", "chair", 120, 4), ("green", "cup", 7, 60)),
        *(("black", "desk", 240, 9), ("white", "plate", 5, 33), ("yellow", "pen", 2, 81)),
        *(("red", "table", 310, 3), ("blue", "clock", 45, 17)),
    )
]


def timed(engine: Engine, batch: int, call: dict[str, Any]) -> tuple[float, list[Completion]]:
    """Tokens per second over prompts and all."""
    prompts = PROMPTS[:batch]
    began = time.perf_counter()
    done = engine.generate_batch(prompts, **call)
    seconds = time.perf_counter() - began
    return sum(len(each.tokens) for each in done) / seconds, done


def ratio(engine: Engine, batch: int, rounds: int, free: dict[str, Any]) -> str:
    """In turn, so that both see the same state of the machine."""
    speeds: list[float] = []
    plain: list[float] = []
    for _ in range(rounds):
        plain.append(timed(engine, batch, free)[0])
        speeds.append(timed(engine, batch, {**free, "regex": ANYTHING})[0])
    share = statistics.median(a / b for a, b in zip(speeds, plain, strict=True))
    return f"{statistics.median(plain):9.1f} {statistics.median(speeds):9.1f} {share:9.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    # Cached prompts would flatter whoever comes second.
    with Engine(given.model, prefix_cache=0) as engine:
        print("a pattern that allows everything, tokens per second")
        print(f"{'decoder':14} {'batch':>5} {'free':>9} {'pattern':>9} {'ratio':>9}")
        blocks = [name for name in ("sbd", "sbd_lossless") if name in engine.decoders]
        for decoder in ("ntp", *blocks):
            for batch in (1, 8):
                free = {"decoder": decoder, "max_tokens": 64, "stop": ["\x00"]}
                engine.generate(PROMPTS[0], regex=ANYTHING, max_tokens=2)  # compiled
                print(f"{decoder:14} {batch:5} {ratio(engine, batch, given.rounds, free)}")
        print("\nforwards per token")
        print(f"{'decoder':14} {'free':>9} {'JSON':>9}")
        for decoder in ("ntp", *blocks):
            shares = []
            for more in ({}, {"grammar": f"start: %json {json.dumps(RECORD)}"}):
                done = timed(engine, 8, {"decoder": decoder, "max_tokens": 64, **more})[1]
                nfe = sum(each.stats.nfe for each in done)
                shares.append(nfe / sum(len(each.tokens) for each in done))
            print(f"{decoder:14} {shares[0]:9.3f} {shares[1]:9.3f}")


if __name__ == "__main__":
    main()
