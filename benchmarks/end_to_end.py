"""Tokens per second of whole generations: Set Block Decoding, next-token decoding, and llama.cpp's
greedy decoding of the same file, in turn, in one run; medians count.

The shapes have random weights, which cannot decide how many positions to reveal per forward: that
number is replayed, see replay.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from model_files import gguf_file, shapes
from options import DOCS, Parser, at_least, integers, run, some_of
from page import Table, page, print_table, write_docs
from peers.process import PeerError, Process
from peers.worker import Missing
from replay import Phase, phases, seconds_of_phase, tokens_per_forward

REDUCTIONS = (2.2, 3.0, 3.4, 3.9)  # forwards saved by published models: 2.2x to 3.9x
Generated = dict[str, Any]


def main() -> None:
    args = arguments()
    results = {}
    for shape in args.shapes:
        results[shape] = measure_shape(args, shape)
    report = {
        "threads": args.threads,
        "rounds": args.rounds,
        "context": args.context,
        "tokens": args.tokens,
        "shapes": results,
    }
    path = args.work_dir / "end_to_end.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    for table in tables(report):
        print_table(table)
    print(f"wrote {path}", file=sys.stderr)
    if args.write_docs:
        write_docs(DOCS / "performance.md", "end_to_end", docs_section(report))


def arguments() -> Any:
    parser = Parser(__doc__ or "", rounds=3)
    names = shapes()
    parser.add_argument(
        "--shapes", type=some_of(names), default=",".join(names), help="with commas"
    )
    parser.add_argument("--block-sizes", type=integers(2), default="8,16,32", help="of SBD")
    parser.add_argument("--context", type=at_least(64), default=256, help="where decoding begins")
    parser.add_argument("--tokens", type=at_least(1), default=192, help="decoded and timed")
    args = parser.parse_args()
    for size in args.block_sizes:
        if args.tokens % size or size >= args.context:
            parser.error(
                f"--tokens: expected a multiple of every block size below --context, got "
                f"{args.tokens} for blocks of {size}"
            )
    return args


class Pair:
    """This engine and llama.cpp, where it is installed, with the same file."""

    def __init__(self, path: str, n_ctx: int, args: Any) -> None:
        options = {"path": path, "threads": args.threads, "n_ctx": n_ctx}
        stem = str(args.work_dir / Path(path).name)
        self.tok_s: dict[str, list[float]] = {}
        self._ours = Process(
            "peers.ours", {"generate": True, **options}, Path(f"{stem}.sbd-engine.log")
        )
        self._llama: Process | None = None
        try:
            self._llama = Process("peers.llama", options, Path(f"{stem}.llama.cpp.log"))
        except (Missing, PeerError) as error:
            print(f"skipping llama.cpp: {error}", file=sys.stderr)

    def ours(self, **options: Any) -> Generated:
        done: Generated = self._ours.call("generate", **options)
        return done

    def time_llama(self, prompt: list[int], max_tokens: int) -> None:
        if self._llama is None:
            return
        for flash in (True, False):
            done = self._llama.call(
                "generate",
                prompt=prompt,
                max_tokens=max_tokens,
                setting={"flash_attention": flash},
            )
            self.add(f"llama.cpp {flash}", (max_tokens - 1) / done["seconds"][-1])

    def add(self, name: str, tok_s: float) -> None:
        self.tok_s.setdefault(name, []).append(tok_s)

    def median(self, name: str) -> float:
        return median(self.tok_s[name])

    def llama_tok_s(self) -> float | None:
        """With or without flash attention, whichever is faster."""
        speeds = [self.median(name) for name in self.tok_s if name.startswith("llama.cpp")]
        return max(speeds, default=None)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._ours, self._llama):
            if process:
                process.close()


def measure_shape(args: Any, shape: str) -> dict[str, Any]:
    """Tokens per second by decoder, on the Q8_0 file of the shape."""
    path = gguf_file(shape, "q8_0", args.work_dir)
    plans = {
        (size, reduction): phases(size, args.tokens // size, reduction)
        for size in args.block_sizes
        for reduction in REDUCTIONS
    }
    prompt = _prompt(args.context)
    with Pair(str(path), args.context + args.tokens + 64, args) as pair:
        for turn in range(args.rounds):
            print(f"{shape}, round {turn + 1}", file=sys.stderr)
            length = args.tokens + 1  # the first comes out of the prompt's forward
            pair.time_llama(prompt, length)
            done = pair.ours(prompt=prompt, max_tokens=length, decoder="ntp", ignore_eos=True)
            pair.add("ntp", args.tokens / done["seconds"][-1])
            for (size, reduction), plan in plans.items():
                seconds = _seconds(pair, args.context, size, plan)
                pair.add(f"sbd {size} {reduction}", args.tokens / seconds)
        return {
            "llama_cpp_tok_s": pair.llama_tok_s(),
            "ntp_tok_s": pair.median("ntp"),
            "sbd": [
                {
                    "block_size": size,
                    "reduction_wanted": reduction,
                    "tokens_per_forward": tokens_per_forward(size, plan),
                    "tok_s": pair.median(f"sbd {size} {reduction}"),
                }
                for (size, reduction), plan in plans.items()
            ],
        }


def _seconds(pair: Pair, context: int, block_size: int, plan: list[Phase]) -> float:
    """Of Set Block Decoding as planned, from `context` on. Every phase is a generation whose prompt
    ends a block earlier: its first block is not counted."""
    seconds = 0.0
    for phase in plan:
        done = pair.ours(
            prompt=_prompt(context - block_size),
            max_tokens=(phase.blocks + 1) * block_size,
            decoder="sbd",
            block_size=block_size,
            unmask="top_n",
            top_n=phase.top_n,
            ignore_eos=True,
        )
        seconds += seconds_of_phase(done, block_size, phase)
        context += phase.blocks * block_size
    return seconds


def _prompt(length: int) -> list[int]:
    return list(range(100, 100 + length))  # what the ids are does not matter


def tables(report: dict[str, Any]) -> list[Table]:
    out = []
    for shape, result in report["shapes"].items():
        base = result["llama_cpp_tok_s"]
        lines = [["llama.cpp greedy", "", "1", *_speed(base, base)]]
        lines.append(["sbd-engine ntp", "", "1", *_speed(result["ntp_tok_s"], base)])
        for sbd in result["sbd"]:
            lines.append(
                [
                    "sbd-engine sbd",
                    str(sbd["block_size"]),
                    f"{sbd['tokens_per_forward']:.2f}",
                    *_speed(sbd["tok_s"], base),
                ],
            )
        title = (
            f"{shape}, q8_0, {report['tokens']} tokens from a context of {report['context']}, "
            "replayed acceptance"
        )
        out.append(Table(title, _HEADER, lines))
    return out


_HEADER = ["decoder", "block size", "tokens per forward", "tok/s", "x llama.cpp"]


def docs_section(report: dict[str, Any]) -> str:
    about = f"{report['threads']} threads, medians of {report['rounds']} rounds."
    return page([about, *tables(report)], "**{}**")


def _speed(tok_s: float | None, base: float | None) -> list[str]:
    return [
        "not measured" if tok_s is None else f"{tok_s:.1f}",
        "" if tok_s is None or base is None else f"{tok_s / base:.2f}",
    ]


if __name__ == "__main__":
    run(main)
