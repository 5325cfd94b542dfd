"""What cuda_quick.sh found, for people: tables, and docs/results-gpu.md.

python3 benchmarks/cuda_page.py FOLDER/results.jsonl [--write-docs]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from page import Table, page

Cells = list[dict[str, Any]]


class Target(NamedTuple):
    """A bound, and what a reading of the kernels expects."""

    bound: float
    estimate: str


# At context 1024, of random weights.
_BANDWIDTH = Target(0.85, "0.84 (0.77-0.88)")  # at least: of one row of bf16
_ROWS = {32: Target(1.15, "1.14 (1.11-1.22)"), 64: Target(1.35, "1.36 (1.28-1.5)")}
_Q8 = Target(0.6, "0.65 (0.61-0.70)")
_SPEEDUP = Target(0.9, "0.93 (0.87-0.96)")  # at least: of the forwards that are saved


def read(path: Path) -> Cells:
    """The results; a line that was cut off with its stage is none."""
    cells = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            cells.append(json.loads(line))
    return cells


def tables(cells: Cells) -> Iterator[Table]:
    header = ["", "measured", "expected", "estimate", ""]
    yield Table("What has to hold", header, list(_checks(cells)))
    yield _stages(cells)
    timed = [c for c in cells if "ms" in c and c["stage"] in ("forwards", "types")]
    if timed:
        yield _forwards(timed)
    profiles = _of(cells, "profile", "kernels")
    if profiles:
        yield _gaps(profiles)
    for profile in profiles:
        yield _kernels(profile)
    generations = _of(cells, "generations", "batch")
    if generations:
        yield _generations(generations)
    tokens = _of(cells, "agreement", "prompts")
    if tokens:
        yield _agreement(tokens[0])
    counted = _of(cells, "ncu", "grid")
    if counted:
        yield _counters(counted)
    if _of(cells, "sweep", "ms"):
        yield _sweep(_of(cells, "sweep", "ms"))
    if _of(cells, "torch", "tok_s"):
        yield _torch(_of(cells, "torch", "tok_s"))


def _of(cells: Cells, stage: str, key: str) -> Cells:
    return [c for c in cells if c["stage"] == stage and key in c]


def _checks(cells: Cells) -> Iterator[list[str]]:
    for cell in _of(cells, "tests", "tests"):
        n, failed = cell["tests"], len(cell["failed"])
        met = n > 0 and failed == 0 and not cell["ended"]
        yield ["C++ tests", cell["ended"] or f"{n - failed} of {n}", "all", "", _met(met)]
    for stage in ("memcheck", "sanitizer"):
        for cell in _of(cells, stage, "clean"):
            name = f"{cell['tool']}: {cell['tests']}"
            yield [name, cell["ended"], "clean", "", _met(cell["clean"])]
    for cell in _of(cells, "agreement", "case"):
        name = f"{cell['shape']}, {cell['case']}: error of logits"
        yield _at_most(name, cell["error"], Target(cell["bound"], ""), "{:.1e}")
    for cell in _of(cells, "agreement", "prompts"):
        explained = cell["equal"] + cell["ties"]
        name = "demo model: texts that are the CPU's, up to ties"
        yield _at_least(name, explained, Target(cell["prompts"], ""), "{}")
    at = {
        (c["shape"], c["type"], c["rows"]): c
        for c in cells
        if "ms" in c and c["stage"] in ("forwards", "types")
    }
    for (shape, dtype, rows), cell in at.items():
        one = at.get((shape, dtype, 1))
        if dtype == "bf16" and rows == 1:
            name = f"{shape}, bf16: bandwidth of one row, of what can be read"
            yield _at_least(name, cell["read_gb_s"] / cell["peak_gb_s"], _BANDWIDTH)
        if dtype == "bf16" and rows in _ROWS and one:
            name = f"{shape}, bf16: {rows} rows, in times of one"
            yield _at_most(name, cell["ms"] / one["ms"], _ROWS[rows])
        bf16 = at.get((shape, "bf16", 1))
        if dtype == "q8_0" and rows == 1 and bf16:
            yield _at_most(
                f"{shape}: one row of q8_0, in times of bf16's", cell["ms"] / bf16["ms"], _Q8
            )
    for cell in _of(cells, "generations", "speedups"):
        if cell["batch"] > 1:
            continue
        for speedup in cell["speedups"]:
            name = f"{cell['shape']}: speedup, of {speedup['reduction']:g}x fewer forwards"
            yield _at_least(name, speedup["measured"] / speedup["reduction"], _SPEEDUP)


def _met(met: bool) -> str:
    return "yes" if met else "NO"


def _at_most(what: str, value: float, target: Target, form: str = "{:.2f}") -> list[str]:
    bound = f"<= {form.format(target.bound)}"
    return [what, form.format(value), bound, target.estimate, _met(value <= target.bound)]


def _at_least(what: str, value: float, target: Target, form: str = "{:.2f}") -> list[str]:
    bound = f">= {form.format(target.bound)}"
    return [what, form.format(value), bound, target.estimate, _met(value >= target.bound)]


def _stages(cells: Cells) -> Table:
    lines = [[c["stage"], c["ended"], f"{c['seconds']:.1f}"] for c in cells if "seconds" in c]
    return Table("Stages", ["", "ended", "s"], lines)


def _forwards(cells: Cells) -> Table:
    one = {(c["shape"], c["type"]): c["ms"] for c in cells if c["rows"] == 1}
    lines = []
    for c in cells:
        first = one.get((c["shape"], c["type"]))
        lines.append(
            [
                f"{c['shape']}, {c['type']}",
                str(c["rows"]),
                f"{c['ms']:.3f}",
                f"{c['ms'] / first:.2f}" if first else "",
                f"{c['floor_ms']:.3f}",
                f"{c['read_gb_s']:.0f}",
                f"{100 * c['read_gb_s'] / c['peak_gb_s']:.0f}",
            ]
        )
    first_cell = cells[0]
    title = (
        f"Forwards behind {first_cell['context']} positions; {first_cell['peak_gb_s']:.0f} GB/s "
        "can be read"
    )
    return Table(title, ["", "rows", "ms", "x one row", "floor ms", "GB/s", "% of that"], lines)


def _gaps(profiles: Cells) -> Table:
    """Where the time goes that is not streaming."""
    lines = [
        [
            f"{p['rows']} rows",
            f"{p['graph_us'] / 1e3:.3f}",
            f"{p['matmuls_us'] / 1e3:.3f}",
            f"{(p['graph_us'] - p['matmuls_us']) / 1e3:.3f}",
            f"{(p['in_turn_us'] - p['graph_us']) / 1e3:.3f}",
            f"{sum(k['us'] for k in p['kernels']) / 1e3:.3f}",
        ]
        for p in profiles
    ]
    header = ["ms", "graph", "matmuls alone", "memory idles", "overlap gains", "sum of kernels"]
    return Table("Where a forward's time goes", header, lines)


def _kernels(profile: dict[str, Any]) -> Table:
    lines = [
        [
            k["name"],
            str(k["calls"]),
            f"{k['us']:.0f}",
            f"{k['us'] / k['calls']:.1f}",
            f"{k['bytes'] / 1e6:.1f}" if k["bytes"] else "",
            f"{k['bytes'] / k['us'] / 1e3:.0f}" if k["bytes"] and k["us"] else "",
        ]
        for k in sorted(profile["kernels"], key=lambda k: -k["us"])
    ]
    title = f"Kernels of {profile['rows']} rows, each alone"
    return Table(title, ["", "calls", "us", "us each", "MB", "GB/s"], lines)


def _generations(cells: Cells) -> Table:
    reductions = next(
        ([s["reduction"] for s in c["speedups"]] for c in cells if "speedups" in c), []
    )
    lines = []
    for c in cells:
        if "missing" in c:
            lines.append([str(c["batch"]), c["missing"], "", *[""] * len(reductions)])
            continue
        speedups = [
            f"{s['measured']:.2f} ({s['formula']:.2f}, {s['modelled']:.2f})" for s in c["speedups"]
        ]
        lines.append(
            [str(c["batch"]), f"{c['prefill_tok_s']:.0f}", f"{c['ntp_tok_s']:.1f}", *speedups]
        )
    title = (
        f"{cells[0]['shape']}, {cells[0]['type']}, context {cells[0]['context']}: speedup over "
        "next-token decoding, measured (by the paper's formula from forwards, from floors)"
    )
    header = ["batch", "prefill tok/s", "ntp tok/s", *(f"{r:g}x fewer" for r in reductions)]
    return Table(title, header, lines)


def _agreement(tokens: dict[str, Any]) -> Table:
    lines = [
        [f"prompt {d['prompt']}", f"{d['error']:.1e}", _met(d["own_tokens"])]
        for d in tokens["differing"]
    ]
    title = f"{tokens['equal']} of {tokens['prompts']} texts of the demo model are the CPU's"
    return Table(title, ["differs", "error of logits there", "each by its own logits"], lines)


def _counters(cells: Cells) -> Table:
    names = [n for n in cells[0] if n not in ("stage", "rows", "grid")]
    lines = [
        [f"{c['rows']} rows, {c['grid']}", *(f"{c[n]:.1f}" if n in c else "" for n in names)]
        for c in cells
    ]
    return Table("Counters of the matmuls", ["grid", *names], lines)


def _sweep(cells: Cells) -> Table:
    kinds = list(dict.fromkeys((c["type"], c["rows"]) for c in cells))
    ms = {(c["settings"], c["type"], c["rows"]): c["ms"] for c in cells}
    lines = []
    for settings in dict.fromkeys(c["settings"] for c in cells):
        line = [settings or "the usual ones"]
        for kind in kinds:
            mine, usual = ms.get((settings, *kind)), ms.get(("", *kind))
            line.append(f"{mine:.3f} ({mine / usual:.3f})" if mine and usual else "")
        lines.append(line)
    header = ["settings", *(f"{dtype}, {rows} rows" for dtype, rows in kinds)]
    return Table("Settings: ms, and times of the usual ones'", header, lines)


def _torch(cells: Cells) -> Table:
    lines = []
    for shape in dict.fromkeys(c["shape"] for c in cells):
        ours, theirs = (
            median(c[key] for c in cells if c["shape"] == shape) for key in ("tok_s", "torch_tok_s")
        )
        lines.append([shape, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"])
    context, about = cells[0]["context"], cells[0]["about"]
    title = f"Next-token decoding in bf16 behind {context} tokens, tok/s, beside {about}"
    return Table(title, ["shape", "sbd-engine", "PyTorch", "ratio"], lines)


def gpu_page(cells: Cells) -> str:
    about = next(
        (c for c in cells if "gpu" in c), {"gpu": "a GPU that was not asked", "commit": "?"}
    )
    parts: list[str | Table] = [
        "# Results on a GPU",
        f"{about['gpu']}; commit {about['commit']}. `benchmarks/cuda_quick.sh` measured this.",
        _ABOUT,
        *tables(cells),
    ]
    return page(parts, "## {}") + "\n"


_ABOUT = """\
- **Estimates** are from a reading of the kernels, before any device had run them.
- **Error of logits**: distance from the CPU's float32 path as a share of a row's norm, the worst
  of 1 to 64 rows, as a block behind 300 causal ones. The models have the shape's widths, two
  layers, and weights that every type holds exactly.
- **Ties**: where a text differs from the CPU's, both devices are asked for the logits of the
  forward that decided differently; these agree within the bound, and each device decided by its
  own.
- **Forwards** are of one block behind a filled cache, random weights, statistics on every row. The
  floor is bytes over the bandwidth of reading, or operations over the peak of the tensor cores,
  both measured in the same run. Q4_K is kept as F16 on the GPU; its floor is of the file's bytes.
- **Where the time goes**: a graph of the matmuls alone is the streaming of weights itself; what the
  whole forward's graph takes beyond it is time in which memory idles; without a kernel starting
  before the end of the last, it takes what overlap gains.
- **Speedups** are of whole generations, 16 blocks of 16 behind the context, by the engine's own
  loop. The weights are random, so a fixed number of positions is revealed per forward (`top_n`),
  mixed to the number of forwards that the paper reports. In brackets, the paper's formula
  `k time(1) / (time(2k) + (l-1) time(k))` from measured forwards, and from their floors, as the
  paper models it."""


def main() -> None:
    docs = "--write-docs" in sys.argv
    paths = [argument for argument in sys.argv[1:] if argument != "--write-docs"]
    if len(paths) != 1 or not Path(paths[0]).is_file():
        print(f"error: expected one results.jsonl of cuda_quick.sh, got {paths}", file=sys.stderr)
        raise SystemExit(2)
    text = gpu_page(read(Path(paths[0])))
    if docs:
        (Path(__file__).parent.parent / "docs" / "results-gpu.md").write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
