"""Milliseconds per forward, of this engine and of others, side by side in one run.

Every engine is a process that is stopped while another one is timed. Rounds go over row counts, and
within one over all engines in turn, so that a machine whose memory bandwidth drifts is as slow for
one as for the other; medians count. Each turn begins with the machine's own peaks, and each round
with another engine. See docs/performance.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from lineup import CLASSES, OURS, PEERS, Entry, entries
from model_files import TYPES, checkpoint, gguf_file, shapes
from options import DOCS, Parser, integers, offer_plain_llama, run, some_of
from page import write_docs
from peers.process import PeerError, Process
from peers.worker import Missing
from report import docs_section, print_report, save_plot

from sbd_engine import SbdError, _core
from sbd_engine.roofline import Work, floor_ms, work

# What is loaded at the same time: the groups take 12 and 16 GB or more.
GROUPS = (("16 bits",), ("8 bits", "6 bits", "4 bits"), ("5 bits", "3 bits", "2 bits"))
_PROMPT, _CHECKED = list(range(100, 120)), list(range(120, 140))  # logits that are compared
_REPEATS = 2  # forwards per turn
T = TypeVar("T")
# Milliseconds by name, context and rows, of each setting.
Samples = dict[tuple[str, int, int], list[list[float]]]


def main() -> None:
    args = arguments()
    measured = Run(args)
    for group in GROUPS:
        measured.measure(group)
    report = measured.report()
    path = args.work_dir / "cpu_peers.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot = args.work_dir / "cpu_peers.png"
    print_report(report)
    save_plot(report, plot)
    print(f"wrote {path} and {plot}", file=sys.stderr)
    if args.write_docs:
        save_plot(report, DOCS / "performance.png")
        write_docs(DOCS / "performance.md", "cpu_peers", docs_section(report))


def arguments() -> Any:
    parser = Parser(__doc__ or "", rounds=5)
    parser.add_argument("--shape", choices=shapes(), default="qwen3-0.6b")
    parser.add_argument("--types", type=some_of(TYPES), default=",".join(TYPES), help="with commas")
    parser.add_argument("--rows", type=integers(1), default="1,2,4,8,16,32,64", help="per forward")
    parser.add_argument(
        "--context", type=integers(1), default="256", help="positions in the KV cache before them"
    )
    parser.add_argument(
        "--peers", type=some_of(PEERS), default=",".join(PEERS), help="beside this engine"
    )
    offer_plain_llama(parser)
    return parser.parse_args()


def rotated(items: list[T], by: int) -> list[T]:
    """As a copy; [0, 1, 2] by 1 is [1, 2, 0]."""
    start = by % len(items) if items else 0
    return items[start:] + items[:start]


class Run:
    """All measurements, and what becomes of them."""

    def __init__(self, args: Any) -> None:
        self._args = args
        self._about: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._results: list[dict[str, Any]] = []
        self._machine: list[dict[str, float]] = []
        self._running: list[tuple[Entry, Process]] = []
        self._works: dict[str, Work] = {}

    def measure(self, group: tuple[str, ...]) -> None:
        """Loads the engines of these classes, times them, and ends them."""
        try:
            for weight_class in group:
                for entry in self._entries(weight_class):
                    self._start(entry)
            if self._running:
                errors = self._errors()
                samples = self._samples()
                self._collect(samples, errors)
        finally:
            for _, process in self._running:
                process.close()
            self._running = []

    def report(self) -> dict[str, Any]:
        args = self._args
        if not self._machine:
            raise RuntimeError(f"nothing was measured: {self._missing}")
        machine = {key: median(s[key] for s in self._machine) for key in self._machine[0]}
        floors = [
            {
                "type": dtype,
                "rows": rows,
                "context": context,
                "ms": floor_ms(self._works[dtype], rows, context, machine),
            }
            for dtype in self._works
            for context in args.context
            for rows in args.rows
        ]
        return {
            "shape": args.shape,
            "threads": args.threads,
            "rounds": args.rounds,
            "machine": machine,
            "machine_samples": self._machine,
            "about": self._about,
            "missing": self._missing,
            "floors": floors,
            "results": self._results,
        }

    def _entries(self, weight_class: str) -> list[Entry]:
        args = self._args
        files: dict[str, Path] = {}
        for dtype in CLASSES[weight_class]:
            if dtype in args.types:
                try:
                    file = gguf_file(args.shape, dtype, args.work_dir)
                    contents = _core.read_gguf(file)
                    self._works[dtype] = work(contents["tensors"], contents["model_config"])
                    files[dtype] = file
                except (ImportError, SbdError) as error:  # no quantiser, or the engine has no such
                    self._leave_out(dtype, error)
        if not files:
            return []
        n_ctx = max(args.context) + max(*args.rows, len(_PROMPT + _CHECKED))
        folder = checkpoint(args.shape, args.work_dir)
        return entries(
            weight_class, files, folder, args.peers, args.threads, n_ctx, args.plain_llama
        )

    def _start(self, entry: Entry) -> None:
        print(f"loading {entry.name}", file=sys.stderr)
        log = self._args.work_dir / f"{entry.name.replace(' ', '_')}.log"
        try:
            process = Process(entry.module, entry.options, log)
        except (Missing, PeerError) as error:
            self._leave_out(entry.name, error)
            return
        self._running.append((entry, process))
        self._about[entry.engine] = process.about

    def _leave_out(self, name: str, error: Exception) -> None:
        self._missing[name] = str(error).replace(f"{self._args.work_dir}/", "")
        print(f"leaving out {name}: {error}", file=sys.stderr)

    def _each(
        self, call: Callable[[Entry, Process], None], running: list[tuple[Entry, Process]]
    ) -> None:
        """Calls these engines in turn, and goes on without one that fails."""
        for entry, process in running:
            try:
                call(entry, process)
            except PeerError as error:
                self._leave_out(entry.name, error)
                process.close()
                self._running.remove((entry, process))

    def _errors(self) -> dict[str, float]:
        """How far each one's logits are from float32's, as a share of these: by name."""
        args = self._args
        folder = str(checkpoint(args.shape, args.work_dir))
        options = {"folder": folder, "weights": "f32", "threads": args.threads}
        file = args.work_dir / "logits.npy"

        def logits(process: Process, setting: dict[str, Any]) -> Any:
            process.call("logits", prompt=_PROMPT, tokens=_CHECKED, setting=setting, to=str(file))
            return np.load(file)

        errors: dict[str, float] = {}
        log = args.work_dir / "reference.log"
        try:
            with closing(Process("peers.pytorch", options, log)) as reference:
                expected = logits(reference, {})
        except (Missing, PeerError) as error:
            self._leave_out("the column of errors", error)
            return errors

        def compare(entry: Entry, process: Process) -> None:
            off = logits(process, entry.settings[0]) - expected
            errors[entry.name] = float(np.linalg.norm(off) / np.linalg.norm(expected))

        self._each(compare, list(self._running))
        return errors

    def _samples(self) -> Samples:
        samples: Samples = {}
        for context, turn, rows in self._turns():
            print(f"context {context}, round {turn + 1}, rows {rows}", file=sys.stderr)

            def sample(
                entry: Entry, process: Process, context: int = context, rows: int = rows
            ) -> None:
                key = (entry.name, context, rows)
                times = samples.setdefault(key, [[] for _ in entry.settings])
                for index, setting in enumerate(entry.settings):
                    times[index] += process.call(
                        "time", rows=rows, context=context, repeats=_REPEATS, setting=setting
                    )

            self._measure_machine()
            self._each(sample, rotated(self._running, turn + 1))
        return samples

    def _measure_machine(self) -> None:
        """In a process of ours, once before a turn of all engines."""
        ours = [running for running in self._running if running[0].engine == OURS]
        self._each(lambda _, process: self._machine.append(process.call("machine")), ours[:1])

    def _turns(self) -> Iterator[tuple[int, int, int]]:
        args = self._args
        for context in args.context:
            for turn in range(args.rounds):
                for rows in args.rows:
                    yield context, turn, rows

    def _collect(self, samples: Samples, errors: dict[str, float]) -> None:
        for entry, _ in self._running:
            measured = []
            for (name, context, rows), times in samples.items():
                if name == entry.name:
                    each = [median(setting) for setting in times]
                    best = min(range(len(each)), key=each.__getitem__)
                    measured.append(
                        {
                            "context": context,
                            "rows": rows,
                            "ms": each[best],
                            "setting": entry.settings[best],
                            "ms_by_setting": each,
                        }
                    )
            self._results.append(
                {
                    "engine": entry.engine,
                    "weights": entry.weights,
                    "class": entry.weight_class,
                    "error": errors.get(entry.name),
                    "settings": entry.settings,
                    "forwards": measured,
                }
            )


if __name__ == "__main__":
    run(main)
