"""`sbd-engine eval`: right answers, tokens per forward and speed, beside next-token decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import experiment, options
from .options import one_line, print_json

if TYPE_CHECKING:
    from ..evaluation.answering import Result
    from ..evaluation.questions import Question

_OUTPUT = "Output"
_MOST_FAMILY = 24  # characters of its name in the table


@options.with_decoding
def evaluate(
    context: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    tasks: experiment.Tasks = None,
    score: experiment.Score = None,
    families: experiment.Families = None,
    limit: experiment.Limit = None,
    chat: experiment.Chat = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="New tokens at most. Without: an exact answer's and 16 more, else 256.",
            rich_help_panel=experiment.QUESTIONS,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            help="Questions at once. Times are of whole batches.",
            rich_help_panel=experiment.QUESTIONS,
        ),
    ] = 1,
    stop: options.Stop = None,
    decoder: options.Decoder = "auto",
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.Grammar = None,
    choices: options.Choices = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    draft: options.Draft = None,
    kv_budget: options.KvBudget = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep every answer here, a JSON object a line. Where the file is there already, "
            "the run goes on from it.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
    **decoding: Any,
) -> int:
    """Answer questions with one right answer each, and again token by token.

    Right is a text equal to the answer, but for space at its ends, or what
    --score says. Without --tasks the questions are the ones shipped with the
    demo model, held out from its training.

    Both decoders run in the same process, in turn on every batch of questions,
    the other one first each time. The speedup is tokens per second over
    next-token decoding's, prompts included. Intervals are 95 %.
    """
    from ..engine import Engine
    from ..evaluation.answering import NTP, Evaluation, Setting, identity, plain
    from ..evaluation.journal import Journal
    from ..evaluation.questions import read_tasks
    from ..parameters import integer

    model = options.one_model(model, model_flag)
    batch = integer("--batch", batch, 1)
    questions = experiment.chosen(read_tasks(tasks, experiment.score_named(score)), families, limit)
    budget = options.in_bytes(kv_budget)
    # Prompts that are asked again, of each setting, take their time each time.
    with Engine(model, device, threads, n_ctx, kv_dtype, draft, budget, 0) as engine:
        options.check_drafts(draft, engine, decoder)
        name = engine.auto_decoder if decoder == "auto" else decoder
        if decoder == "auto" and name == NTP:
            options.note("this model does not say that it can decode blocks: ntp alone")
        settings = [Setting(NTP, {"decoder": NTP, **(decoding if name == NTP else {})})]
        if name != NTP:
            settings.append(Setting(name, {"decoder": name, **decoding}))
        common = {
            **options.given(context, options.SAMPLING_NAMES),
            **options.constraint(context),
            "stop": stop or (),
        }
        evaluation = Evaluation(
            engine,
            questions,
            settings,
            batch=batch,
            max_tokens=max_tokens,
            chat=chat,
            common=common,
        )
        settled = identity(model, evaluation, kv_dtype, draft)
        with Journal(out, settled, evaluation.fits) as journal:
            interrupted = experiment.run_with_progress(evaluation, journal)
        results = evaluation.results(journal)
        report: dict[str, Any] = {
            "model": experiment.model_name(model),
            "device": engine.device,
            "n_threads": engine.n_threads,
            "tasks": str(tasks) if tasks else "shipped",
            "scores": sorted({question.score for question in questions}),
            "questions": len(questions),
            "answered": len(results[NTP]),
            "batch": batch,
            "max_tokens": max_tokens,
            "chat": chat,
            "decoders": {s.name: plain({**common, **s.options}) for s in settings},
            "results": _rows(questions, results),
        }
    if json:
        print_json(report)
    else:
        _print_report(report)
    if interrupted:
        experiment.note_interruption(report["answered"], len(questions), out)
    return 130 if interrupted else 0


def _rows(questions: list[Question], results: dict[str, list[Result]]) -> list[dict[str, Any]]:
    """A row per family and decoder, then over all questions (family None)."""
    from ..evaluation.answering import NTP, summary

    families: list[str | None] = list(dict.fromkeys(q.family for q in questions))
    families = [*families, None] if len(families) > 1 else [None]
    rows = []
    for family in families:
        for decoder, all_results in results.items():
            chosen = {
                name: [r for r in each if family is None or questions[r.question].family == family]
                for name, each in ((NTP, results[NTP]), (decoder, all_results))
            }
            if chosen[decoder]:
                figures = summary(chosen[decoder], chosen[NTP])
                accuracy = figures.pop("quality")
                rows.append({"family": family, "decoder": decoder, "accuracy": accuracy, **figures})
    return rows


def _print_report(report: dict[str, Any]) -> None:
    from rich.markup import escape

    from ..evaluation.intervals import forwards, gain
    from .console import Console, Table, print_table

    console = Console(markup=False)
    experiment.print_heading(console, report)
    if not report["results"]:
        return
    table = Table(
        *("family", "n", "decoder", "right %", "95 %", "tok/forward", "tok/s", "x ntp"),
        words=("family", "decoder"),
    )
    shown: object = ()
    for row in report["results"]:
        family = row["family"]
        first, shown = family != shown, family
        table.add_row(
            escape("all" if family is None else _shown(family)) if first else "",
            str(row["questions"]) if first else "",
            row["decoder"],
            f"{100 * row['accuracy']['value']:.1f}",
            experiment.span(row["accuracy"], 100, ".1f", "-"),
            f"{row['tokens_per_forward']['value']:.2f}",
            f"{row['tok_s']:.0f}",
            f"{row['speedup']['value']:.2f}",
            style="bold" if family is None else None,
        )
    print_table(table)
    last = report["results"][-1]
    if last["decoder"] == "ntp":
        return
    loss, speedup = last["loss"], last["speedup"]
    console.print(
        f"{last['decoder']} beside ntp on the same questions: "
        f"{gain(loss)} points, {forwards(last['tokens_per_forward'])}, "
        f"{speedup['value']:.2f}x the speed ({experiment.span(speedup, 1, '.2f')})",
    )
    if last["drafts"] is not None:
        console.print(_drafted(last["decoder"], last["drafts"]))


def _drafted(decoder: str, drafts: dict[str, Any]) -> str:
    forwards = drafts["forwards"]
    shares = ", ".join(
        f"{100 * count / sum(forwards.values()):.0f} % {kind.replace('_', ' ')}"
        for kind, count in sorted(forwards.items(), key=lambda item: -item[1])
    )
    guesses, accepted = drafts["guesses"], drafts["accepted"]
    kept = f", and {100 * accepted / guesses:.0f} % of {guesses} guesses kept" if guesses else ""
    return f"{decoder} chose its forwards as it went: {shares}{kept}"


def _shown(family: str) -> str:
    name = one_line(family)
    return name if len(name) <= _MOST_FAMILY else f"{name[: _MOST_FAMILY - 1]}…"
