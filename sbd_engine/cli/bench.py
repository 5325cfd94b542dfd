"""`sbd-engine bench`: milliseconds per forward, and the speedup that follows from them."""

from __future__ import annotations

import json as json_module
import math
from collections import Counter
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
_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")  # the engine's


class Subject(NamedTuple):
    """What is timed."""

    name: str
    core: Engine
    weight_bytes: int  # that a forward reads
    operations: Counter[str]  # of a row's matmuls, by the operands they take


# What a weight's type multiplies with: the integers of quantised groups, else itself.
_OPERANDS = {"f32": "f32", "f16": "f32", "bf16": "bf16"}


def bench(
    model: options.Model = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Instead of a model: a config.json, whose shape gets random weights."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="Of --config's weights: f32, f16, bf16, q8_0 (without), q4_0, q4_k or q6_k."
        ),
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

    The floor of a forward is what this machine cannot beat, measured in the same run: the time to
    read the weights and the KV cache, or to do the operations (attention in float32), whichever
    is longer.

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
    measured = [core.measure_peaks()]
    times = {}
    for context in contexts:
        milliseconds = core.time_forwards(rows, context, repeats)
        times[context] = {n: median(ms) for n, ms in zip(rows, milliseconds, strict=True)}
        measured.append(core.measure_peaks())
    peaks = {name: median(peak[name] for peak in measured) for name in measured[0]}
    kv_bytes = _kv_bytes_per_position(core, kv_dtype)
    for context, ms in times.items():
        for n in rows:
            floor = _floor_ms(subject, n, context, kv_bytes, peaks)
            results.append(
                {
                    "rows": n,
                    "context": context,
                    "ms_per_forward": ms[n],
                    "ratio_to_one_row": ms[n] / ms[1] if 1 in ms else None,
                    "floor_ms": floor,
                }
            )
        if all(n in ms for n in (1, _BLOCK_SIZE, 2 * _BLOCK_SIZE)):
            speedups.append({"context": context, "speedup": implied_speedup(ms, nfe_reduction)})
    return {
        "model": subject.name,
        "device": core.device,
        "n_threads": core.n_threads,
        "machine": {
            "read_gb_s": peaks["read"] / 1e9,
            "int8_gop_s": peaks["int8"] / 1e9,
            "bf16_gflop_s": peaks["bf16"] / 1e9,
            "f32_gflop_s": peaks["f32"] / 1e9,
        },
        "weight_bytes": subject.weight_bytes,
        "results": results,
        "implied_speedup": {
            "block_size": _BLOCK_SIZE,
            "nfe_reduction": nfe_reduction,
            "results": speedups,
        },
    }


def _floor_ms(
    subject: Subject, rows: int, context: int, kv_bytes: int, peaks: dict[str, float]
) -> float:
    read = (subject.weight_bytes + context * kv_bytes) / peaks["read"]
    seconds = sum(rows * n / peaks[operands] for operands, n in subject.operations.items())
    config = subject.core.model_config()
    heads = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    attention = 4 * rows * (context + rows) * heads  # two products, of keys and of values
    return 1000 * float(max(read, seconds + attention / peaks["f32"]))


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
        core = _core.Engine(path, **settings)
        return _subject(path.name, core, _core.read_gguf(path)["tensors"])


def _from_config(path: Path, dtype: str, settings: dict[str, Any]) -> Subject:
    from gguf import GGMLQuantizationType

    from .. import _core
    from ..convert.architectures import model_metadata, tensor_specs
    from ..convert.errors import ConvertError
    from ..convert.quantize import stored_bytes, stored_type

    try:
        config = json_module.loads(path.read_text())
    except FileNotFoundError:
        raise SbdFileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise SbdValueError(f"{path}: expected a config.json, got no JSON: {error}") from None
    if not isinstance(config, dict):
        raise SbdValueError(f"{path}: expected a config.json, got no JSON object")
    if dtype not in _TYPES:
        raise SbdValueError(f"expected --type as one of {', '.join(_TYPES)}, got {dtype!r}")
    wanted = GGMLQuantizationType[dtype.upper()]
    tied = bool(config.get("tie_word_embeddings", False))
    try:
        metadata = dict(model_metadata(config))
        tensors = []
        for spec in tensor_specs(config, tied=tied):
            stored = stored_type(spec.shape, wanted)
            size = stored_bytes(spec.shape, stored)
            tensors.append((spec.name, stored.name.lower(), spec.shape, size))
    except ConvertError as error:
        raise SbdValueError(f"{path}: {error}") from None
    core = _core.Engine.random(metadata, dtype, tied, **settings)
    return _subject(f"{path.name} ({dtype}, random weights)", core, tensors)


def _subject(
    name: str, core: Engine, tensors: list[tuple[str, str, tuple[int, ...], int]]
) -> Subject:
    """Of an embedding that is not the head as well, a row reads next to nothing."""
    untied = any(tensor == "output.weight" for tensor, *_ in tensors)
    weight_bytes = 0
    operations: Counter[str] = Counter()
    for tensor, dtype, shape, size in tensors:
        if untied and tensor == "token_embd.weight":
            continue
        weight_bytes += size
        if len(shape) == 2:
            operations[_OPERANDS.get(dtype, "int8")] += 2 * math.prod(shape)
    return Subject(name, core, weight_bytes, operations)


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
    table = Table(
        *("context", "rows", "ms/forward", "x one row", "floor ms", "x floor"),
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in table.columns:
        column.justify = "right"
    for result in report["results"]:
        ratio = result["ratio_to_one_row"]
        table.add_row(
            str(result["context"]),
            str(result["rows"]),
            f"{result['ms_per_forward']:.3f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{result['floor_ms']:.3f}",
            f"{result['ms_per_forward'] / result['floor_ms']:.2f}",
        )
    console.print(table)
    machine = report["machine"]
    console.print(
        f"this machine: {machine['read_gb_s']:.1f} GB/s read, {machine['int8_gop_s']:.0f} GOP/s in "
        f"int8, {machine['bf16_gflop_s']:.0f} GFLOP/s in bf16, {machine['f32_gflop_s']:.0f} in f32"
    )
    implied = report["implied_speedup"]
    for result in implied["results"]:
        console.print(
            f"implied speedup {result['speedup']:.2f}x at context {result['context']}: blocks of "
            f"{implied['block_size']}, {implied['nfe_reduction']:g}x fewer forwards"
        )
