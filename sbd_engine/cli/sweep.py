"""`sbd-engine sweep`: quality against tokens per forward, and the gamma to take."""

from __future__ import annotations

import json as json_module
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SbdFileError, SbdValueError
from . import experiment, options
from .options import print_json

if TYPE_CHECKING:
    from ..engine import Engine

_SWEEP, _OUTPUT = "Sweep", "Output"


def sweep(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    gammas: Annotated[
        str, typer.Option(help="Of entropy_bounded, in nats, with commas.", rich_help_panel=_SWEEP)
    ] = "0,.01,.1,.2,.4,.8,1.5",
    unmask: Annotated[
        str,
        typer.Option(
            help="Rules, with commas: entropy_bounded, factor, confidence, top_n; or all. The "
            "other three have ladders of their own.",
            rich_help_panel=_SWEEP,
        ),
    ] = "entropy_bounded",
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
            help="How much quality the recommended gamma may cost, in points of 100.",
            rich_help_panel=_SWEEP,
        ),
    ] = 1.0,
    tasks: experiment.Tasks = None,
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
            help="New tokens at most. Without: the answer's and 16 more; 256 after a prompt.",
            rich_help_panel=experiment.QUESTIONS,
        ),
    ] = None,
    stop: options.Stop = None,
    batch: Annotated[
        int, typer.Option(help="Questions at once.", rich_help_panel=experiment.QUESTIONS)
    ] = 16,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
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

    Decodes the same questions with every gamma, and with the other unmasking
    rules and block sizes asked for, in batches. Recommends the gamma of most
    tokens per forward that loses no more quality than --max-loss.

    Quality is the share of right answers. With --prompts it is the share of
    new tokens that next-token decoding would have chosen in their place, given
    the text before them; "identical" is the share of texts equal to its whole
    text. Intervals are 95 %.
    """
    from ..engine import Engine
    from ..evaluation.answering import Evaluation, identity, summary
    from ..evaluation.journal import Journal
    from ..evaluation.questions import read_prompts, read_tasks
    from ..evaluation.sweeping import RULES, as_row, grid, recommend, settings
    from ..parameters import integer

    if tasks is not None and prompts is not None:
        raise SbdValueError("expected --tasks or --prompts, got both")
    if not 0 <= max_loss <= 100:  # NaN too
        raise SbdValueError(f"expected --max-loss from 0 to 100 points, got {max_loss:g}")
    model = options.one_model(model, model_flag)
    batch = integer("--batch", batch, 1)
    rules = list(RULES) if unmask == "all" else list(dict.fromkeys(unmask.split(",")))
    gamma_values = experiment.numbers("--gammas", gammas, 0)
    sizes = None if block_sizes is None else _sizes(block_sizes)
    grid(sizes or [1], rules, gamma_values)  # a misspelt rule is told before the model is loaded
    read = read_tasks(tasks) if prompts is None else read_prompts(prompts)
    questions = experiment.chosen(read, families, limit)
    with Engine(model, device=device, n_threads=threads, n_ctx=n_ctx, kv_dtype=kv_dtype) as engine:
        points = grid(sizes or [_own_size(engine)], rules, gamma_values)
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
        with Journal(path, identity(model, evaluation, kv_dtype)) as journal:
            interrupted = experiment.run_with_progress(evaluation, journal)
        reference, *others = evaluation.results(journal).values()
        rows = []
        if reference:
            for point, results in zip([None, *points], [reference, *others], strict=True):
                rows.append(as_row(point, summary(results, reference)))
        best = recommend(rows, max_loss / 100)
        report: dict[str, Any] = {
            "model": experiment.model_name(model),
            "device": engine.device,
            "n_threads": engine.n_threads,
            "questions": len(questions),
            "answered": len(reference),
            "quality": "right answers" if prompts is None else "agreement with ntp",
            "source": str(prompts or tasks or "shipped"),
            "batch": batch,
            "max_tokens": max_tokens,
            "chat": chat,
            "results": rows,
            "max_loss": max_loss,
            "recommended": best and _recommendation(best, model, engine),
        }
    if out and rows and not interrupted:
        _write(report, out, plot)
    if json:
        print_json(report)
    else:
        _print_report(report)
    if interrupted:
        experiment.note_interruption(report["answered"], len(questions), path)
    return 130 if interrupted else 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise SbdValueError(f"expected --block-sizes as integers >= 1 with commas, got {text!r}")
    return sizes


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


def _recommendation(best: dict[str, Any], model: Path | None, engine: Engine) -> dict[str, Any]:
    gamma = f"{float(best['gamma']):.12g}"
    flags = ["--gamma", gamma]
    keys = [f"sbd.gamma={gamma}"]
    if best["block_size"] != engine.defaults["block_size"]:
        flags += ["--block-size", str(best["block_size"])]
        keys.append(f"sbd.block_size={best['block_size']}")
    if engine.defaults["unmask"] != best["unmask"]:
        flags += ["--unmask", best["unmask"]]
        keys.append(f"sbd.unmask={best['unmask']}")
    if engine.auto_decoder != "sbd":
        flags += ["--decoder", "sbd"]
        others = [name for name in engine.defaults["decoders"] if name != "sbd"]
        keys.append(f"sbd.decoders={','.join(['sbd', *others])}")
    command = ["sbd-engine", "run", *([] if model is None else [str(model)]), *flags]
    return {
        **best,
        "command": f"{shlex.join(command)} -p '...'",
        "in_the_file": " ".join(
            ["sbd-engine convert DIR -o model.bin", *(f"--set {key}" for key in keys)]
        ),
    }


def _write(report: dict[str, Any], out: Path, plot: bool) -> None:
    _replace(out / "sweep.json", json_module.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if plot:
        _plot(report, out / "sweep.png")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _plot(report: dict[str, Any], path: Path) -> None:
    """A panel per block size, a curve per rule."""
    from ..evaluation import plots
    from ..evaluation.sweeping import RULES

    reference, *rows = report["results"]
    sizes = list(dict.fromkeys(row["block_size"] for row in rows))
    figure, axes = plots.panels(len(sizes))
    best = report["recommended"]
    for axis, size in zip(axes, sizes, strict=True):
        plots.draw_reference(axis, reference)
        for rule, colour in zip(RULES, plots.COLOURS, strict=False):
            curve = [row for row in rows if (row["block_size"], row["unmask"]) == (size, rule)]
            if curve:
                plots.draw_curve(
                    axis, curve, rule, colour, "gamma" if "gamma" in curve[0] else None
                )
        if best and best["block_size"] == size:
            plots.draw_ring(axis, best, "recommended")
        plots.finish(
            axis,
            f"{report['model']}, blocks of {size}, gamma beside its points",
            f"{report['quality']}, %",
        )
    temporary = path.with_name(f"{path.stem}.part.png")
    plots.save(figure, temporary)
    temporary.replace(path)


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{report['model']} on {report['device']}, {report['n_threads']} threads, "
        f"{report['answered']} questions in batches of {report['batch']}",
        soft_wrap=True,
    )
    if not report["results"]:
        return
    agreement = report["quality"] != "right answers"
    table = Table(
        *("block", "rule", "value", "agree %" if agreement else "right %", "95 %"),
        *(("identical %",) if agreement else ()),
        "tok/forward",
        *(() if agreement else ("95 %",)),
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in table.columns:
        column.no_wrap = True
        if column.header != "rule":
            column.justify = "right"
    best = report["recommended"]
    for row in report["results"]:
        table.add_row(
            *_cells(row),
            f"{100 * row['quality']['value']:.1f}",
            experiment.span(row["quality"], 100, ".1f", "-"),
            *((f"{100 * row['identical']['value']:.1f}",) if agreement else ()),
            f"{row['tokens_per_forward']['value']:.2f}",
            *(() if agreement else (experiment.span(row["tokens_per_forward"], 1, ".2f", "-"),)),
            style="bold" if best and _cells(row) == _cells(best) else None,
        )
    console.print(table)
    for line in _advice(report):  # a command is copied: it has no line ends of its own
        console.print(line, soft_wrap=line.startswith(" "), markup=False)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    from ..evaluation.sweeping import RULES

    if row["decoder"] == "ntp":
        return "", "ntp", ""
    option = RULES[row["unmask"]].option
    return str(row["block_size"]), row["unmask"], f"{float(row[option]):g}"


def _advice(report: dict[str, Any]) -> list[str]:
    best, limit = report["recommended"], report["max_loss"]
    bounded = [row for row in report["results"] if row.get("unmask") == "entropy_bounded"]
    if not bounded:
        return []
    if report["results"][0]["quality"]["value"] == 0:
        return ["no gamma can be recommended: ntp has none of these right"]
    if best is None:
        least = min(bounded, key=lambda row: row["loss"]["value"])
        return [
            f"no gamma here loses at most {limit:g} points: the least is "
            f"{100 * least['loss']['value']:.1f}, with gamma {float(least['gamma']):g}; "
            "--max-loss allows more"
        ]
    loss = best["loss"]
    return [
        f"recommended: gamma {float(best['gamma']):g} in blocks of {best['block_size']}: "
        f"{best['tokens_per_forward']['value']:.2f} tokens per forward, "
        f"{100 * loss['value']:.1f} points lost ({experiment.span(loss, 100, '.1f')}), "
        f"{limit:g} allowed",
        f"  now:         {best['command']}",
        f"  in the file: {best['in_the_file']}",
    ]
