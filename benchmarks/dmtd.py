"""Time per token of Direct Multi-Token Decoding over that of next-token decoding, in turn, in one
run, on random weights in Qwen3-4B's shape; medians count. Quality is the checkpoint's affair: the
forwards are those of any text.
"""

from __future__ import annotations

import time
from statistics import median

from model_files import read_shape
from options import DOCS, Parser, at_least, integers, run
from page import Table, page, print_table, write_docs

from sbd_engine import _core
from sbd_engine.engine import engine_options
from sbd_engine.random_model import random_model

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
LAYERS = (0, 28, 8)  # encoding, thinking, decoding: the released checkpoint's
PROMPT = 64


def main() -> None:
    parser = Parser(__doc__ or "", rounds=3)
    parser.add_argument("--horizons", type=integers(1), default="2,3,4,6", help="with commas")
    parser.add_argument("--tokens", type=at_least(12), default=24, help="timed, of each text")
    parser.add_argument("--type", default="q8_0", help="of the weights")
    args = parser.parse_args()

    config = read_shape("qwen3-0.6b") | QWEN3_4B
    settings = engine_options("auto", args.threads, PROMPT + args.tokens + 1, "f16")
    core, _ = random_model(config, args.type, settings, {"sbd.dmtd.layers": list(LAYERS)})
    horizons: list[int | None] = [None, *args.horizons]  # None: next-token decoding
    seconds: dict[int | None, list[float]] = {horizon: [] for horizon in horizons}
    for _ in range(args.rounds):
        for horizon in horizons:
            seconds[horizon].append(per_token(core, horizon, args.tokens))
    ms = {horizon: 1e3 * median(values) for horizon, values in seconds.items()}
    table = Table(
        f"Qwen3-4B shape, {args.type}, layers {'/'.join(map(str, LAYERS))}, {args.threads} threads",
        ["decoder", "ms per token", "of ntp", "weights read"],
        [
            [
                "ntp" if horizon is None else f"dmtd, horizon {horizon}",
                f"{ms[horizon]:.1f}",
                f"{ms[horizon] / ms[None]:.2f}",
                f"{weights_read(config, horizon):.2f}",
            ]
            for horizon in horizons
        ],
    )
    print_table(table)
    if args.write_docs:
        write_docs(DOCS / "performance.md", "dmtd", page([table]))


def per_token(core: _core.Engine, horizon: int | None, tokens: int) -> float:
    """Seconds, from the first token on."""
    request = _core.Request()
    request.prompt = list(range(3, 3 + PROMPT))
    request.max_tokens = tokens + 1
    request.ignore_eos = True
    request.decoder = "ntp" if horizon is None else "dmtd"
    request.options = {} if horizon is None else {"horizon": horizon}
    inbox = _core.Inbox(core)
    inbox.add(request)
    started: float | None = None
    while event := inbox.next():
        committed, *_ = event.read()
        if started is None and committed:
            started = time.perf_counter()
    assert started is not None
    return (time.perf_counter() - started) / tokens


def weights_read(config: dict[str, int], horizon: int | None) -> float:
    """Of those that a token of next-token decoding reads, LM head included."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    attention = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * dim * hidden
    layer = attention + 3 * hidden * config["intermediate_size"]
    head = hidden * config["vocab_size"]
    if horizon is None:
        return 1.0
    cycle = sum(LAYERS) + (horizon - 1) * LAYERS[2]
    return (cycle * layer / horizon + head) / (sum(LAYERS) * layer + head)


if __name__ == "__main__":
    run(main)
