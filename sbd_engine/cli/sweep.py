"""`sbd-engine sweep`: quality against tokens per forward, and the setting to take."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdFileError, SbdValueError
from . import experiment, options
from .lists import floats, integers
from .options import print_json

if TYPE_CHECKING:
    from ..engine import Engine
    from ..evaluation.sweeping import Point

_SWEEP, _OUTPUT = "Sweep", "Output"


def sweep(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    gammas: Annotated[
        str | None,
        typer.Option(
            help="Of entropy_bounded, in nats, with commas. Without: 0,.01,.1,.2,.4,.8,1.5.",
            rich_help_panel=_SWEEP,
        ),
    ] = None,
    unmask: Annotated[
        str,
        typer.Option(
            help="Rules, with commas: entropy_bounded, factor, confidence, top_n; or all. The "
            "other three have ladders of their own.",
            rich_help_panel=_SWEEP,
        ),
    ] = "entropy_bounded,factor,confidence",
    block_sizes: Annotated[
        str | None,
        typer.Option(
            help="Positions per block, with commas. Without: the model's.", rich_help_panel=_SWEEP
        ),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(
            metavar="POINTS",
            help="How much quality the recommended setting may cost, in points of 100.",
            rich_help_panel=_SWEEP,
        ),
    ] = 1.0,
    tasks: experiment.Tasks = None,
    score: experiment.Score = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Instead of questions: prompts, one a line, or "prompt" in each line of a .jsonl '
            "file. Quality is then agreement with next-token decoding.",
            rich_help_panel=experiment.QUESTIONS,
        ),
    ] = None,
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
    stop: options.Stop = None,
    batch: Annotated[
        int,
        typer.Option(
            help="Questions at once. Speeds are those of whole batches.",
            rich_help_panel=experiment.QUESTIONS,
        ),
    ] = 1,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    kv_budget: options.KvBudget = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write sweep.json, sweep.png and every answer (answers.jsonl) here. A folder with "
            "answers of the same sweep is gone on from.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Find how bold Set Block Decoding may be with this model.

    Decodes the same questions token by token, as the file says, losslessly,
    and with every value of the unmasking rules and block sizes asked for.

    Recommends, of the settings that lose no more quality than --max-loss and
    are not slower than next-token decoding, the fastest, where several are
    alike the one of most tokens per forward. Where there are too few questions
    to tell, it says so. `sbd-engine set` writes the setting into the file.

    Quality is the share of right answers. With --prompts it is the share of
    new tokens that next-token decoding would have chosen in their place, given
    the text before them; "identical" is the share of texts equal to its whole
    text. Intervals are 95 %.
    """
    from ..convert.comma_list import parsed
    from ..engine import Engine
    from ..evaluation.answering import Evaluation, identity, summary
    from ..evaluation.journal import Journal
    from ..evaluation.questions import read_prompts, read_tasks
    from ..evaluation.recommending import evidence, recommend
    from ..evaluation.sweeping import GAMMAS, RULES, as_row, grid, settings
    from ..parameters import integer
    from .sweep_report import commands, print_report

    if prompts is not None:
        for flag, given in (("--tasks", tasks), ("--score", score)):
            if given is not None:
                raise SbdValueError(f"expected {flag} or --prompts, got both")
    if not 0 <= max_loss <= 100:  # NaN too
        raise SbdValueError(f"expected --max-loss from 0 to 100 points, got {max_loss:g}")
    model = options.one_model(model, model_flag)
    batch = integer("--batch", batch, 1)
    rules = list(RULES) if unmask == "all" else list(dict.fromkeys(parsed(unmask, str)))
    if gammas is not None and "entropy_bounded" not in rules:
        raise SbdValueError("--gammas is of entropy_bounded, which --unmask leaves out")
    values = GAMMAS if gammas is None else floats("--gammas", gammas, 0)
    sizes = None if block_sizes is None else integers("--block-sizes", block_sizes, 1)
    grid(sizes or [1], rules, values)  # a misspelt rule is told before the model is loaded
    if prompts is None:
        read = read_tasks(tasks, experiment.score_named(score))
    else:
        read = read_prompts(prompts)
    questions = experiment.chosen(read, families, limit)
    budget = options.in_bytes(kv_budget)
    # Prompts that are asked again, of each setting, take their time each time.
    with Engine(model, device, threads, n_ctx, kv_dtype, None, budget, 0) as engine:
        points = _points(engine, model, sizes or [_own_size(engine)], rules, values)
        evaluation = Evaluation(
            engine,
            questions,
            settings(points),
            batch=batch,
            max_tokens=max_tokens,
            chat=chat,
            common={"stop": stop or ()},
        )
        plot = _ready_for(out)
        path = out / "answers.jsonl" if out else None
        settled = identity(model, evaluation, kv_dtype)
        with Journal(path, settled, evaluation.fits) as journal:
            interrupted = experiment.run_with_progress(evaluation, journal)
            reference, *others = evaluation.results(journal).values()
            report: dict[str, Any] = {
                "model": experiment.model_name(model),
                "device": engine.device,
                "n_threads": engine.n_threads,
                "questions": len(questions),
                "answered": len(reference),
                "quality": "right answers" if prompts is None else "agreement with ntp",
                "source": str(prompts or tasks or "shipped"),
                "scores": sorted({q.score for q in questions}) if prompts is None else [],
                "batch": batch,
                "max_tokens": max_tokens,
                "chat": chat,
                "results": [],
                "max_loss": max_loss,
                "recommended": None,
            }
            if reference:
                rows = [
                    as_row(point, summary(results, reference))
                    for point, results in zip([None, *points], [reference, *others], strict=True)
                ]
                judged = sum(r.tokens for r in reference) if prompts else len(reference)
                known = evidence(len(reference), judged, max_loss / 100)
                found = recommend(rows, known)
                best = found.best and {**found.best, **commands(found.best, model, engine)}
                report |= {"results": rows, "evidence": {**asdict(known), "enough": known.enough}}
                report |= {"recommended": best, "reason": found.reason, "nearest": found.nearest}
                if out and not interrupted:
                    _write(report, out, plot)
    if json:
        print_json(report)
    else:
        print_report(report)
    if interrupted:
        experiment.note_interruption(report["answered"], len(questions), path)
    return 130 if interrupted else 0


def _points(
    engine: Engine, model: Path | None, sizes: list[int], rules: list[str], gammas: Sequence[float]
) -> list[Point]:
    from .. import _core
    from ..evaluation.sweeping import grid, with_files_own
    from ..model_file import model_file

    with model_file(model) as path:
        able = _core.read_gguf(path)["decoders"]
    points = grid(sizes, rules, gammas)
    return with_files_own(points, engine.auto_decoder, able, engine.defaults)


def _own_size(engine: Engine) -> int:
    size: int | None = engine.defaults["block_size"]
    if not size:
        raise SbdValueError(
            f"sweep decodes with sbd; this file names {engine.auto_decoder} and no block size: "
            "give --block-sizes"
        )
    return size


def _ready_for(out: Path | None) -> bool:
    """Makes the folder; whether a plot can be drawn into it."""
    from ..evaluation import plots

    if out is None:
        return False
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SbdFileError(f"--out {out}: expected a folder: {error.strerror}") from None
    if not plots.installed():
        options.note("no plot: it needs matplotlib (pip install 'sbd-engine[plot]')")
        return False
    return True


def _write(report: dict[str, Any], out: Path, plot: bool) -> None:
    from ..evaluation import plots
    from ..replacing import replacing

    with replacing(out / "sweep.json") as path:
        path.write_text(json_module.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if plot:
        with replacing(out / "sweep.png") as path:
            plots.save(_figure(report), path)


def _figure(report: dict[str, Any]) -> Any:
    """A panel per block size, a curve per rule."""
    from ..evaluation import plots
    from ..evaluation.sweeping import LOSSLESS, RULES

    reference, *rows = report["results"]
    sizes = list(dict.fromkeys(row["block_size"] for row in rows if "block_size" in row))
    figure, axes = plots.panels(len(sizes))
    best = report["recommended"]
    for axis, size in zip(axes, sizes, strict=True):
        plots.draw_reference(axis, reference)
        here = [row for row in rows if row.get("block_size", size) == size]
        for rule, colour in zip(RULES, plots.COLOURS, strict=False):
            curve = [row for row in here if row.get("unmask") == rule]
            if curve:
                plots.draw_curve(
                    axis, curve, rule, colour, "gamma" if "gamma" in curve[0] else None
                )
        for row in here:
            if row["default"]:
                plots.draw_mark(axis, row, "D", "what the file says")
            if row["decoder"] == LOSSLESS:
                plots.draw_mark(axis, row, "s", LOSSLESS)
        if best and best.get("block_size", size) == size:
            plots.draw_mark(axis, best, "o", "recommended")
        plots.finish(
            axis,
            f"{report['model']}, blocks of {size}, gamma beside its points",
            f"{report['quality']}, %",
        )
    return figure
