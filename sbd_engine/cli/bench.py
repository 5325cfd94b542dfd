"""`sbd-engine bench`: milliseconds per forward, and the speedup that follows from them."""

from __future__ import annotations

import json as json_module
import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .. import roofline
from ..errors import SbdValueError
from ..model_file import existing, model_file
from ..parameters import integer
from ..random_model import ShapeError, random_model
from ..roofline import Work, bytes_read, floor_ms, implied_speedup, work
from ..text_file import read_text
from . import options
from .lists import integers
from .options import print_json

if TYPE_CHECKING:
    from .._core import Engine

_AGREEMENTS = (0.5, 0.7, 0.8, 0.9, 0.95)  # shares of a draft's guesses, each where those before do
_PEAK_SAMPLES = 3  # before and behind every context; their median counts


class Subject(NamedTuple):
    """What is timed."""

    name: str
    core: Engine
    work: Work


def bench(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Instead of a model: a config.json, whose shape gets random weights."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(help="Of --config's weights, as inspect names them; q8_0 by default."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows per forward.")] = "1,2,4,8,16,32,64",
    context: Annotated[str, typer.Option(help="Positions in the KV cache before them.")] = "256",
    batch: Annotated[
        int, typer.Option(help="Sequences in every forward, each with those rows.")
    ] = 1,
    repeats: Annotated[int, typer.Option(help="Forwards timed; their median counts.")] = 9,
    nfe_reduction: Annotated[
        float, typer.Option(help="Tokens per forward that the implied speedup assumes.")
    ] = 3.5,
    device: options.Device = "auto",
    threads: options.Threads = None,
    kv_dtype: options.KvDtype = "f16",
    draft: options.Draft = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time forwards of one to many rows, statistics wanted on every row.

    The floor of a forward is what this machine cannot beat, measured in the same run: the time to
    read the weights and the KV cache, or to do the operations, whichever is longer. GB/s is what
    the forward reads over its time.

    The implied speedup is the Set Block Decoding paper's: k time(1) / (time(2k) + (l-1) time(k))
    for blocks of k positions, decided in l = k / nfe-reduction forwards each, two at least.

    What sbd_lossless would choose by these times is shown for drafts whose
    guesses agree with next-token decoding that often.

    With --draft the same rows are timed with that adapter too, all of them.
    """
    from ..engine import engine_options

    model = options.one_model(model, model_flag)
    repeats = integer("--repeats", repeats, 1)
    batch = integer("--batch", batch, 1)
    row_counts = integers("--rows", rows, 1)
    contexts = integers("--context", context, 0)
    if not 0 < nfe_reduction < math.inf:  # NaN too
        raise SbdValueError(f"expected --nfe-reduction above 0, got {nfe_reduction}")
    engine_settings = engine_options(device, threads, None, kv_dtype)
    engine_settings["draft"] = None if draft is None else existing(draft, "--draft")
    if config is None:
        if type is not None:
            raise SbdValueError(f"expected --type with --config only, got --type {type}")
        subject = _from_model(model, engine_settings)
    elif model is None:
        engine_settings["n_ctx"] = max(contexts) + max(row_counts)
        subject = _from_config(config, type or "q8_0", engine_settings)
    else:
        raise SbdValueError("expected a model file or --config, got both")
    report = measure(
        subject, row_counts, contexts, batch, repeats, nfe_reduction, draft is not None
    )
    if json:
        print_json(report)
    else:
        _print_report(report)


def measure(
    subject: Subject,
    rows: list[int],
    contexts: list[int],
    batch: int,
    repeats: int,
    nfe_reduction: float,
    draft: bool = False,
) -> dict[str, Any]:
    """The report, as `--json` prints it. GB are 10^9 bytes."""
    core = subject.core
    samples = _peaks(core)
    times: dict[int, dict[int, float]] = {}
    drafts: dict[int, dict[int, float]] = {}
    for context in contexts:
        milliseconds = core.time_forwards(rows, context, repeats, batch, draft)
        times[context] = dict(zip(rows, map(median, milliseconds), strict=False))
        drafts[context] = dict(zip(rows, map(median, milliseconds[len(rows) :]), strict=False))
        samples += _peaks(core)
    machine = {name: median(sample[name] for sample in samples) for name in samples[0]}
    results = [
        {
            "rows": n,
            "context": context,
            "ms_per_forward": ms[n],
            "ratio_to_one_row": ms[n] / ms[1] if 1 in ms else None,
            "floor_ms": floor_ms(subject.work, n, context, machine, batch),
            "read_gb_s": bytes_read(subject.work, context, batch) / ms[n] / 1e6,
            "draft_ms_per_forward": drafts[context].get(n),
        }
        for context, ms in times.items()
        for n in rows
    ]
    speedups = [
        {"context": context, "block_size": k, "speedup": implied_speedup(ms, k, nfe_reduction)}
        for context, ms in times.items()
        for k in rows
        if k >= 2 * nfe_reduction and 1 in ms and 2 * k in ms
    ]
    lossless = [
        {"context": context, "agreement": agreement, **_best_lossless(ms, agreement, batch)}
        for context, ms in times.items()
        for agreement in _AGREEMENTS
        if 1 in ms and len(ms) > 1
    ]
    return {
        "model": subject.name,
        "device": core.device,
        "batch": batch,
        "n_threads": core.n_threads,
        "machine": machine,
        "weight_bytes": subject.work.weight_bytes,
        "results": results,
        "implied_speedup": {"nfe_reduction": nfe_reduction, "results": speedups},
        "lossless": lossless,
    }


def _best_lossless(ms: dict[int, float], agreement: float, batch: int) -> dict[str, Any]:
    from .. import _core

    totals = {batch * rows: each for rows, each in ms.items()}
    size, alone, every, speedup = _core.best_lossless(totals, agreement, batch)
    return {
        "block_size": size,
        "verified_alone": alone,
        "every_outcome": every,
        "speedup": speedup,
    }


def _peaks(core: Engine) -> list[dict[str, float]]:
    return [roofline.measure(core) for _ in range(_PEAK_SAMPLES)]


def _from_model(model: Path | None, settings: dict[str, Any]) -> Subject:
    from .. import _core

    with model_file(model) as path:
        core = _core.Engine(path, **settings)
        tensors = _core.read_gguf(path)["tensors"]
        return Subject(path.name, core, work(tensors, core.model_config(), settings["kv_dtype"]))


def _from_config(path: Path, dtype: str, settings: dict[str, Any]) -> Subject:
    from .. import _core

    text = read_text(path)
    try:
        config = json_module.loads(text)
    except ValueError as error:
        raise SbdValueError(f"{path}: expected a config.json, got no JSON: {error}") from None
    if not isinstance(config, dict):
        raise SbdValueError(f"{path}: expected a config.json, got no JSON object")
    if dtype not in _core.DTYPES:
        raise SbdValueError(f"expected --type as one of {', '.join(_core.DTYPES)}, got {dtype!r}")
    try:
        core, work = random_model(config, dtype, settings)
    except ShapeError as error:
        raise SbdValueError(f"{path}: {error}") from None
    return Subject(f"{path.name} ({dtype}, random weights)", core, work)


def _machine_text(report: dict[str, Any]) -> str:
    machine = report["machine"]
    if not report["device"].startswith("cpu"):  # quants are multiplied as halves
        return (
            f"{machine['read_gb_s']:.0f} GB/s read, {machine['bf16_gflop_s'] / 1e3:.0f} "
            f"TFLOP/s in 16 bits, {machine['f32_gflop_s'] / 1e3:.1f} in f32"
        )
    return (
        f"{machine['read_gb_s']:.1f} GB/s read, {machine['int8_gop_s']:.0f} GOP/s in int8, "
        f"{machine['bf16_gflop_s']:.0f} GFLOP/s in bf16, {machine['f32_gflop_s']:.0f} in f32"
    )


def _print_report(report: dict[str, Any]) -> None:
    from .console import Console, Table, print_table

    console = Console()
    on = f"{report['model']} on {report['device']}"
    if report["device"].startswith("cpu"):
        on += f", {report['n_threads']} threads"
    if report["batch"] > 1:
        on += f", {report['batch']} sequences"
    console.print(on)
    columns = ["context", "rows", "ms/forward", "x one row", "floor ms", "x floor", "GB/s"]
    draft = report["results"][0]["draft_ms_per_forward"] is not None
    table = Table(*columns, *(["draft ms", "x plain"] if draft else []))
    for result in report["results"]:
        ratio, plain, with_draft = (
            result[key] for key in ("ratio_to_one_row", "ms_per_forward", "draft_ms_per_forward")
        )
        table.add_row(
            str(result["context"]),
            str(result["rows"]),
            f"{result['ms_per_forward']:.3f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{result['floor_ms']:.3f}",
            f"{result['ms_per_forward'] / result['floor_ms']:.2f}",
            f"{result['read_gb_s']:.1f}",
            *([f"{with_draft:.3f}", f"{with_draft / plain:.2f}"] if draft else []),
        )
    print_table(table)
    console.print(f"this machine: {_machine_text(report)}")
    implied = report["implied_speedup"]
    for context in dict.fromkeys(result["context"] for result in implied["results"]):
        speedups = [result for result in implied["results"] if result["context"] == context]
        best = max(speedups, key=lambda result: result["speedup"])
        listed = ", ".join(f"{r['speedup']:.2f}x in blocks of {r['block_size']}" for r in speedups)
        console.print(
            f"{implied['nfe_reduction']:g}x fewer forwards at context {context} would be {listed}: "
            f"the best block size here is {best['block_size']}"
        )
    for context in dict.fromkeys(result["context"] for result in report["lossless"]):
        listed = ", ".join(
            f"{_chosen(result)} at {100 * result['agreement']:.0f} %"
            for result in report["lossless"]
            if result["context"] == context
        )
        console.print(f"sbd_lossless at context {context}, by how many guesses agree: {listed}")


def _chosen(result: dict[str, Any]) -> str:
    if result["block_size"] == 1:
        return "no drafts"
    return f"blocks of {result['block_size']} ({result['speedup']:.2f}x)"
