"""Set Block Decoding's claim in small: the demo model's accuracy on held-out tasks with one exact
answer each, against tokens per forward and against time. One command makes docs/results.md's
numbers and plots.

Every answer is kept in the work folder: the same command goes on where it was cut off.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from options import DOCS, Parser, at_least, run
from page import write_docs
from results_page import save_plot, sections

from sbd_engine import Engine, _core
from sbd_engine.engine import engine_options
from sbd_engine.evaluation.answering import NTP, Evaluation, Result, Setting, identity, summary
from sbd_engine.evaluation.journal import Journal
from sbd_engine.evaluation.questions import Question, read_tasks, select
from sbd_engine.evaluation.sweeping import GAMMAS, RULES, Point, as_row, grid, settings

BLOCK_SIZES = (4, 8, 16, 32)
BLOCK_GAMMAS = (0.8, 1.5)  # of the block sizes beside the model's own; low and high as well
TYPES = ("f32", "q8_0", "q4_0")
ROWS = (1, 4, 8, 16, 32, 64)
_CONTEXT = 64  # of the forwards timed alone: the middle of a question

Results = dict[str, list[Result]]


def main() -> None:
    args = arguments()
    questions = select(read_tasks(args.tasks), None, args.limit)
    few = select(questions, None, args.curve_limit)
    report = {
        "questions": len(questions),
        "curve_questions": len(few),
        "families": [*dict.fromkeys(q.family for q in questions)],
        "gammas": {"low": args.gamma_low, "high": args.gamma_high},
        **measure_types(args, questions),
        "curves": measure_curves(args, few),
    }
    path = args.work_dir / "results.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    if args.write_docs:
        for name, section in sections(report).items():
            write_docs(DOCS / "results.md", name, section)
        save_plot(report, DOCS / "results.png")
        print(f"wrote {DOCS / 'results.md'} and results.png", file=sys.stderr)
    else:
        print("\n\n".join(sections(report).values()))


def arguments() -> Any:
    parser = Parser(__doc__ or "", rounds=3)
    parser.add_argument("--ntp-only", type=Path, required=True, help="model before SBD tuning, f32")
    for name in TYPES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=Path, required=True, help=f"model after SBD tuning, {name}")
    parser.add_argument("--tasks", type=Path, help="a file in place of the shipped tasks")
    parser.add_argument("--limit", type=at_least(1), default=200, help="questions of each family")
    parser.add_argument(
        "--curve-limit", type=at_least(1), default=60, help="the same, for curves of many settings"
    )
    parser.add_argument("--gamma-low", type=float, default=0.003, help="the careful one")
    parser.add_argument("--gamma-high", type=float, default=0.0075, help="the bold one")
    return parser.parse_args()


def answers(
    args: Any, model: Path, questions: Sequence[Question], wanted: Sequence[Setting]
) -> Results:
    """All answers of a model, those of an earlier run included. One question at a time, and the
    settings in turn, so that times can be compared."""
    with Engine(model, n_threads=args.threads, prefix_cache=0) as engine:
        evaluation = Evaluation(engine, questions, wanted, batch=1)
        key = identity(model, evaluation, "f16")
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        with Journal(args.work_dir / f"{model.stem}-{name}.jsonl", key) as journal:
            for count in evaluation.run(journal):
                print(
                    f"\r{model.name}: {count} of {evaluation.size} answers", end="", file=sys.stderr
                )
        print(file=sys.stderr)
        return evaluation.results(journal)


def measure_types(args: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """NTP and SBD with every type of weights, and NTP before SBD tuning."""
    gammas = {"low": args.gamma_low, "high": args.gamma_high}
    wanted = settings([])
    for name, gamma in gammas.items():
        wanted.append(
            Setting(name, {"decoder": "sbd", "unmask": "entropy_bounded", "gamma": gamma})
        )
    before = answers(args, args.ntp_only, questions, wanted[:1])[NTP]
    types = []
    tuning = []
    for name in TYPES:
        path = getattr(args, name)
        results = answers(args, path, questions, wanted)
        if name == "f32":
            tuning = table(questions, {"ntp_only": before, **results}, before)
        types.append(
            {
                "type": name,
                "bytes": path.stat().st_size,
                **about(args, path),
                "families": table(questions, results, results[NTP]),
            }
        )
    return {"tuning": tuning, "types": types}


def table(
    questions: Sequence[Question], results: Results, reference: Sequence[Result]
) -> list[dict[str, Any]]:
    """A row per family, then one over all (family None): each decoder's figures, whose loss is
    against the reference."""
    rows: list[dict[str, Any]] = []
    for family in [*dict.fromkeys(q.family for q in questions), None]:

        def mine(all_results: Sequence[Result], family: str | None = family) -> list[Result]:
            return [
                r for r in all_results if family is None or questions[r.question].family == family
            ]

        figures = {name: summary(mine(each), mine(reference)) for name, each in results.items()}
        rows.append({"family": family, **figures})
    return rows


def about(args: Any, model: Path) -> dict[str, Any]:
    """What the model is, and how long a forward of one to many rows takes."""
    core = _core.Engine(model, **engine_options("auto", args.threads, None, "f16"))
    times = [core.time_forwards(list(ROWS), _CONTEXT, 9) for _ in range(args.rounds)]
    return {
        "file": model.name,
        "device": core.device,
        "threads": core.n_threads,
        "ms": {
            str(rows): median(ms for each in times for ms in each[i]) for i, rows in enumerate(ROWS)
        },
    }


def measure_curves(args: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """The Q8_0 file: all rules in the model's block size, and gamma in all sizes."""
    with Engine(args.q8_0) as engine:
        own = engine.defaults["block_size"]
    both = {args.gamma_low, args.gamma_high}
    points = grid([own], RULES, sorted({*GAMMAS, *both}))
    other_sizes = [size for size in BLOCK_SIZES if size != own]
    points += grid(other_sizes, ["entropy_bounded"], sorted({*BLOCK_GAMMAS, *both}))
    results = answers(args, args.q8_0, questions, settings(points))
    reference, *others = results.values()
    each: list[Point | None] = [None, *points]
    rows = [
        as_row(point, summary(done, reference))
        for point, done in zip(each, [reference, *others], strict=True)
    ]
    return {"block_size": own, "file": args.q8_0.name, "ntp": rows[0], "rows": rows[1:]}


if __name__ == "__main__":
    run(main)
