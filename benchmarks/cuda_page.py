"""The results of cuda_suite.py for people: tables, and docs/results-gpu.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cuda_agreement import CASES
from report import Table, markdown

# At context 1024, of random bf16 weights: rows to the most that a forward may take of one row's.
RATIOS = {32: 1.15, 64: 1.35}
_CONTEXT = 1024


def tables(report: dict[str, Any]) -> Iterator[Table]:
    yield Table("What has to hold", ["", "measured", "expected", ""], list(_checks(report)))
    if "agreement" in report:
        yield _agreement(report["agreement"])
    for result in report.get("forwards", []):
        yield _forwards(result)
    shapes = list(dict.fromkeys(r["shape"] for r in report.get("generations", [])))
    for shape in shapes:
        yield _generations([r for r in report["generations"] if r["shape"] == shape])
    if "torch" in report:
        yield _torch(report["torch"])


def _checks(report: dict[str, Any]) -> Iterator[list[str]]:
    if "agreement" in report:
        for shape, errors in report["agreement"]["logits"].items():
            for case, error in errors.items():
                bound = CASES[case].bound
                yield _at_most(f"{shape}, {case}: error of logits", error, bound, "{:.1e}")
        tokens = report["agreement"]["tokens"]
        explained = tokens["equal"] + tokens["ties"]
        yield _at_least(
            "demo model: texts that are the CPU's, up to ties", explained, tokens["prompts"], "{}"
        )
    one_row: dict[str, dict[str, float]] = {}
    for result in report.get("forwards", []):
        at = {r["rows"]: r for r in result["results"] if r["context"] == _CONTEXT}
        if 1 not in at:
            continue
        shape, dtype = result["shape"], result["type"]
        one_row.setdefault(shape, {})[dtype] = at[1]["ms_per_forward"]
        if dtype == "bf16":
            share = at[1]["read_gb_s"] / result["machine"]["read_gb_s"]
            yield _at_least(
                f"{shape}, bf16: bandwidth of one row, of what can be read", share, 0.85
            )
            for rows, most in RATIOS.items():
                ratio = at[rows]["ratio_to_one_row"]
                yield _at_most(f"{shape}, bf16: {rows} rows, in times of one", ratio, most)
    for shape, ms in one_row.items():
        if {"bf16", "q8_0"} <= set(ms):
            ratio = ms["q8_0"] / ms["bf16"]
            yield _at_most(f"{shape}: one row of q8_0, in times of bf16's", ratio, 0.6)
    for result in report.get("generations", []):
        if result["batch"] == 1 and "missing" not in result:
            for speedup in result["speedups"]:
                reduction = speedup["reduction"]
                what = f"{result['shape']}, context {result['context']}: speedup of {reduction:g}x"
                yield _at_least(f"{what} fewer forwards", speedup["measured"], 0.9 * reduction)


def _at_most(what: str, value: float, bound: float, form: str = "{:.2f}") -> list[str]:
    met = value <= bound
    return [what, form.format(value), f"<= {form.format(bound)}", "yes" if met else "NO"]


def _at_least(what: str, value: float, bound: float, form: str = "{:.2f}") -> list[str]:
    met = value >= bound
    return [what, form.format(value), f">= {form.format(bound)}", "yes" if met else "NO"]


def _agreement(result: dict[str, Any]) -> Table:
    tokens = result["tokens"]
    lines = [
        [f"prompt {d['prompt']}", f"{d['error']:.1e}", "yes" if d["own_tokens"] else "NO"]
        for d in tokens["differing"]
    ]
    title = f"{tokens['equal']} of {tokens['prompts']} texts of the demo model are the CPU's"
    return Table(title, ["differs", "error of logits there", "each by its own logits"], lines)


def _forwards(result: dict[str, Any]) -> Table:
    peak = result["machine"]["read_gb_s"]
    lines = [
        [
            str(r["context"]),
            str(r["rows"]),
            f"{r['ms_per_forward']:.3f}",
            f"{r['ratio_to_one_row']:.2f}",
            f"{r['floor_ms']:.3f}",
            f"{r['read_gb_s']:.0f}",
            f"{100 * r['read_gb_s'] / peak:.0f}",
        ]
        for r in result["results"]
    ]
    title = f"{result['shape']}, {result['type']}; {peak:.0f} GB/s can be read"
    header = ["context", "rows", "ms", "x one row", "floor ms", "GB/s", "% of that"]
    return Table(title, header, lines)


def _generations(results: list[dict[str, Any]]) -> Table:
    reductions = next(
        ([s["reduction"] for s in r["speedups"]] for r in results if "missing" not in r), []
    )
    lines = []
    for r in results:
        at = [str(r["context"]), str(r["batch"])]
        if "missing" in r:
            lines.append([*at, r["missing"], "", *[""] * len(reductions)])
            continue
        speedups = [
            f"{s['measured']:.2f} ({s['formula']:.2f}, {s['modelled']:.2f})" for s in r["speedups"]
        ]
        lines.append([*at, f"{r['prefill_tok_s']:.0f}", f"{r['ntp_tok_s']:.1f}", *speedups])
    title = (
        f"{results[0]['shape']}, {results[0]['type']}: speedup over next-token decoding, measured "
        "(by the paper's formula from forwards, from floors)"
    )
    header = ["context", "batch", "prefill tok/s", "ntp tok/s"]
    return Table(title, [*header, *(f"{r:g}x fewer" for r in reductions)], lines)


def _torch(results: list[dict[str, Any]]) -> Table:
    lines = []
    for r in results:
        if "missing" in r:
            lines.append([r["shape"], f"not measured: {r['missing']}", "", ""])
        else:
            ratio = r["tok_s"] / r["torch_tok_s"]
            lines.append(
                [r["shape"], f"{r['tok_s']:.1f}", f"{r['torch_tok_s']:.1f}", f"{ratio:.2f}"]
            )
    about = next((r["about"] for r in results if "about" in r), "PyTorch")
    title = f"Next-token decoding in bf16 behind 1024 tokens, tok/s, beside {about}"
    return Table(title, ["shape", "sbd-engine", "PyTorch", "ratio"], lines)


def page(report: dict[str, Any]) -> str:
    parts = [
        "# Results on a GPU",
        f"{report['device']}; medians of {report['rounds']} rounds. `benchmarks/cuda_suite.sh "
        "--write-docs` made this page.",
        _ABOUT,
    ]
    for table in tables(report):
        parts.append(f"## {table.title}")
        if table.lines:
            parts.append(markdown(table))
    return "\n\n".join(parts) + "\n"


_ABOUT = """\
- **Error of logits**: distance from the CPU's float32 path as a share of a row's norm, the worst
  of 1 to 64 rows, as a block behind 300 causal ones. The models have the shape's widths, two
  layers, and weights that every type holds exactly.
- **Ties**: where a text differs from the CPU's, both devices are asked for the logits of the
  forward that decided differently; these agree within the bound, and each device decided by its
  own.
- **Forwards** are of one block behind a filled cache, random weights, statistics on every row. The
  floor is bytes over the bandwidth of reading, or operations over the peak of the tensor cores,
  both measured in the same run.
- **Speedups** are of whole generations, 16 blocks of 16 behind the context, by the engine's own
  loop. The weights are random, so a fixed number of positions is revealed per forward (`top_n`),
  mixed to the number of forwards that the paper reports. In brackets, the paper's formula
  `k time(1) / (time(2k) + (l-1) time(k))` from measured forwards, and from their floors, as the
  paper models it.
- **PyTorch** is transformers' model with a static cache and `torch.compile`; its tokens stay on the
  GPU."""
