"""`sbd-engine bench`: milliseconds per forward, and the speedup that follows from them."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import SbdFileNotFoundError, SbdValueError
from ..parameters import integer
from . import options
from .options import print_json

if TYPE_CHECKING:
    from .._core import Engine

_BLOCK_SIZE = 16  # of the implied speedup


class Subject(NamedTuple):
    """What is timed."""

    name: str
    core: Engine
    weight_bytes: int  # that a forward of one row reads


def bench(
    model: options.Model = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Instead of a model: a config.json, whose shape gets random weights."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(help="Of --config's weights: f32, f16, bf16, q8_0 (without) or q4_0."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows per forward.")] = "1,2,4,8,16,32,64",
    context: Annotated[str, typer.Option(help="Positions in the KV cache before them.")] = "256",
    repeats: Annotated[int, typer.Option(help="Forwards timed; their median counts.")] = 9,
    nfe_reduction: Annotated[
        float, typer.Option(help="Tokens per forward that the implied speedup assumes.")
    ] = 3.5,
    device: options.Device = "auto",
    threads: options.Threads = None,
    kv_dtype: options.KvDtype = "f16",
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time forwards of one to many rows, statistics wanted on every row.

    The implied speedup is the Set Block Decoding paper's: k time(1) / (time(2k) + (l-1) time(k))
    for blocks of k = 16 positions, decided in l = k / nfe-reduction forwards each.
    """
    from ..engine import engine_options

    repeats = integer("--repeats", repeats, 1)
    row_counts = _integers("--rows", rows, 1)
    contexts = _integers("--context", context, 0)
    if not 0 < nfe_reduction <= _BLOCK_SIZE:  # NaN too
        raise SbdValueError(
            f"expected --nfe-reduction above 0 and at most {_BLOCK_SIZE}, got {nfe_reduction}"
        )
    engine_settings = engine_options(device, threads, None, kv_dtype)
    if config is None:
        if type is not None:
            raise SbdValueError(f"expected --type with --config only, got --type {type}")
        subject = _from_model(model, engine_settings)
    elif model is None:
        engine_settings["n_ctx"] = max(contexts) + max(row_counts)
        subject = _from_config(config, type or "q8_0", engine_settings)
    else:
        raise SbdValueError("expected a model file or --config, got both")
    report = measure(subject, row_counts, contexts, repeats, nfe_reduction, kv_dtype)
    if json:
        print_json(report)
    else:
        _print_report(report)


def measure(
    subject: Subject,
    rows: list[int],
    contexts: list[int],
    repeats: int,
    nfe_reduction: float,
    kv_dtype: str,
) -> dict[str, Any]:
    """The report, as `--json` prints it. GB are 10^9 bytes."""
    core = subject.core
    results, speedups = [], []
    one_row: dict[str, Any] | None = None
    for context in contexts:
        ms = {n: median(core.time_forward(n, context, repeats)) for n in rows}
        for n in rows:
            ratio = ms[n] / ms[1] if 1 in ms else None
            results.append(
                {"rows": n, "context": context, "ms_per_forward": ms[n], "ratio_to_one_row": ratio}
            )
        if 1 in ms and one_row is None:
            read = subject.weight_bytes + context * _kv_bytes_per_position(core, kv_dtype)
            one_row = {"context": context, "bytes_read": read, "gb_s": read / ms[1] / 1e6}
        if all(n in ms for n in (1, _BLOCK_SIZE, 2 * _BLOCK_SIZE)):
            speedups.append({"context": context, "speedup": implied_speedup(ms, nfe_reduction)})
    return {
        "model": subject.name,
        "device": core.device,
        "n_threads": core.n_threads,
        "results": results,
        "one_row": one_row,
        "read_bandwidth_gb_s": core.read_bandwidth() / 1e9,
        "implied_speedup": {
            "block_size": _BLOCK_SIZE,
            "nfe_reduction": nfe_reduction,
            "results": speedups,
        },
    }


def implied_speedup(ms: dict[int, float], nfe_reduction: float) -> float:
    """Of Set Block Decoding over one token per forward (arXiv 2509.04185): in `forwards` forwards
    per block, the first runs the last block's commit as well."""
    k = _BLOCK_SIZE
    forwards = k / nfe_reduction
    return k * ms[1] / (ms[2 * k] + (forwards - 1) * ms[k])


def _kv_bytes_per_position(core: Engine, kv_dtype: str) -> int:
    config = core.model_config()
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return int(values) * (4 if kv_dtype == "f32" else 2)


def _from_model(model: Path | None, settings: dict[str, Any]) -> Subject:
    from .. import _core
    from ..model_file import model_file

    with model_file(model) as path:
        sizes = {name: size for name, _, _, size in _core.read_gguf(path)["tensors"]}
        return Subject(path.name, _core.Engine(path, **settings), _bytes_read(sizes))


def _from_config(path: Path, dtype: str, settings: dict[str, Any]) -> Subject:
    from .. import _core
    from ..convert.architectures import model_metadata, tensor_specs
    from ..convert.errors import ConvertError
    from ..convert.quantize import stored_bytes, stored_type, weight_type

    try:
        config = json_module.loads(path.read_text())
    except FileNotFoundError:
        raise SbdFileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise SbdValueError(f"{path}: expected a config.json, got no JSON: {error}") from None
    if not isinstance(config, dict):
        raise SbdValueError(f"{path}: expected a config.json, got no JSON object")
    tied = bool(config.get("tie_word_embeddings", False))
    try:
        wanted = weight_type(dtype)
        metadata = dict(model_metadata(config))
        sizes = {
            spec.name: stored_bytes(spec.shape, stored_type(spec.shape, wanted))
            for spec in tensor_specs(config, tied=tied)
        }
    except ConvertError as error:
        raise SbdValueError(f"{path}: {error}") from None
    core = _core.Engine.random(metadata, dtype, tied, **settings)
    return Subject(f"{path.name} ({dtype}, random weights)", core, _bytes_read(sizes))


def _bytes_read(sizes: dict[str, int]) -> int:
    """Of an embedding that is not the head as well, a row reads next to nothing."""
    untied = "output.weight" in sizes
    return sum(sizes.values()) - (sizes.get("token_embd.weight", 0) if untied else 0)


def _integers(name: str, text: str, low: int) -> list[int]:
    try:
        values = sorted({int(part) for part in text.split(",")})
        values = [integer(name, value, low) for value in values]
    except ValueError:
        values = []
    if not values or values[0] < low:
        raise SbdValueError(f"expected {name} as integers >= {low} with commas, got {text!r}")
    return values


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{report['model']} on {report['device']}, {report['n_threads']} threads")
    table = Table("context", "rows", "ms/forward", "x one row", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.justify = "right"
    for result in report["results"]:
        ratio = result["ratio_to_one_row"]
        table.add_row(
            str(result["context"]),
            str(result["rows"]),
            f"{result['ms_per_forward']:.3f}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    console.print(table)
    peak = report["read_bandwidth_gb_s"]
    if report["one_row"]:
        reached = report["one_row"]["gb_s"]
        share = f"{reached / peak:.0%} of" if reached <= peak else "from cache, more than"
        console.print(f"one row reads {reached:.1f} GB/s, {share} this machine's {peak:.1f} GB/s")
    implied = report["implied_speedup"]
    for result in implied["results"]:
        console.print(
            f"implied speedup {result['speedup']:.2f}x at context {result['context']}: blocks of "
            f"{implied['block_size']}, {implied['nfe_reduction']:g}x fewer forwards"
        )
