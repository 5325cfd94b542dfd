"""What `eval` and `sweep` share: their questions, the engine they ask, progress, interruption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .options import one_line

if TYPE_CHECKING:
    from ..evaluation.answering import Evaluation
    from ..evaluation.journal import Journal
    from ..evaluation.questions import Question
    from .console import Console

QUESTIONS = "Questions"

Tasks = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Questions, a JSON object a line: "prompt", "answer", perhaps "family" and "score". '
        "Without: the demo model's.",
        rich_help_panel=QUESTIONS,
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        help="When a text is right: exact (it is the answer, the default), contains (the answer "
        "stands in it), regex (the answer, a regular expression, matches in it) or last_number "
        '(that of both is the same). A task\'s own "score" goes first.',
        rich_help_panel=QUESTIONS,
    ),
]
Families = Annotated[
    str | None,
    typer.Option(help="Only these, with commas.", rich_help_panel=QUESTIONS),
]
Limit = Annotated[
    int | None,
    typer.Option(help="The first N of each family.", rich_help_panel=QUESTIONS),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Put each into the model's chat template.", rich_help_panel=QUESTIONS
    ),
]


def chosen(questions: list[Question], families: str | None, limit: int | None) -> list[Question]:
    from ..convert.comma_list import parsed
    from ..evaluation.questions import select
    from ..parameters import integer

    names = parsed(families, str.strip) if families is not None else None
    return select(questions, names, None if limit is None else integer("--limit", limit, 1))


def score_named(score: str | None) -> str:
    from ..evaluation.scoring import EXACT, SCORES
    from ..parameters import one_of

    return EXACT if score is None else one_of("--score", score, list(SCORES))


def model_name(model: Path | None) -> str:
    return "demo.bin" if model is None else model.name


def run_with_progress(evaluation: Evaluation, journal: Journal) -> bool:
    """Runs it; True where Ctrl-C cut it off."""
    from .console import progress

    note_left_out(journal)
    with progress("answers", evaluation.size) as show:
        try:
            for count in evaluation.run(journal):
                show(count)
        except KeyboardInterrupt:
            return True
    return False


def note_left_out(journal: Journal) -> None:
    if journal.left_out:
        lines = "1 line" if journal.left_out == 1 else f"{journal.left_out} lines"
        options.note(f"--out: {lines} left out: cut off, damaged, or of another run")


def note_interruption(count: int, total: int, out: Path | None, what: str = "questions") -> None:
    kept = f"kept in {out}: the same command goes on" if out else "nothing was kept without --out"
    options.note(f"interrupted after {count} of {total} {what}; {kept}")


def print_engine(console: Console, report: dict[str, Any], asked: str = "") -> None:
    """Which engine it was, and what was asked of it."""
    engine = f"{report['model']} on {report['device']}, {report['n_threads']} threads"
    console.print(one_line(f"{engine}, {asked}" if asked else engine), soft_wrap=True)


def print_heading(console: Console, report: dict[str, Any]) -> None:
    how = "one at a time" if report["batch"] == 1 else f"in batches of {report['batch']}"
    print_engine(console, report, f"{report['answered']} questions {how}")


def span(estimate: dict[str, float], scale: float, form: str, between: str = " to ") -> str:
    """The interval, as text."""
    return f"{scale * estimate['low']:{form}}{between}{scale * estimate['high']:{form}}"
