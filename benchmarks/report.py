"""The result of cpu_peers.py for people: tables, a plot, and the section of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lineup import CLASSES, OURS
from page import Table, page, print_table

_COLOURS = {
    "sbd-engine": "#0b6e4f",
    "llama.cpp": "#c0392b",
    "OpenVINO": "#2c5fa8",
    "onnxruntime": "#7d3c98",
    "PyTorch": "#e08e0b",
}


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """One per class of weights and context: engines down, rows per forward across."""
    for weight_class, types in CLASSES.items():
        results = [r for r in report["results"] if r["class"] == weight_class]
        contexts = sorted({f["context"] for r in results for f in r["forwards"]})
        for context in contexts:
            rows = sorted({f["rows"] for r in results for f in r["forwards"]})
            lines = []
            for result in results:
                ms = milliseconds(result, context)
                error = result["error"]
                lines.append(
                    [f"{result['engine']} {result['weights']}"]
                    + ["" if error is None else f"{error:.3f}"]
                    + [f"{ms[n]:.1f}" for n in rows]
                )
            for dtype in types:
                ms = floors(report, dtype, context)
                if ms:
                    lines.append([f"floor {dtype}", "", *(f"{ms[n]:.1f}" for n in rows)])
            title = f"{weight_class}, {context} positions in the KV cache, ms per forward"
            yield Table(title, ["rows per forward", "error", *map(str, rows)], lines)


def milliseconds(result: dict[str, Any], context: int) -> dict[int, float]:
    return {f["rows"]: f["ms"] for f in result["forwards"] if f["context"] == context}


def floors(report: dict[str, Any], dtype: str, context: int) -> dict[int, float]:
    return {
        f["rows"]: f["ms"]
        for f in report["floors"]
        if f["type"] == dtype and f["context"] == context
    }


def print_report(report: dict[str, Any]) -> None:
    for table in tables(report):
        print_table(table)
    print(machine_line(report))
    for name, why in report["missing"].items():
        print(f"not measured: {name}: {why}")


def machine_line(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"{report['threads']} threads; measured meanwhile: {machine['read_gb_s']:.1f} GB/s read, "
        f"{machine['int8_gop_s']:.0f} GOP/s int8, {machine['bf16_gflop_s']:.0f} GFLOP/s bf16 and "
        f"{machine['f32_gflop_s']:.0f} GFLOP/s float32"
    )


def docs_section(report: dict[str, Any]) -> str:
    about = "; ".join(report["about"].values())
    return page(
        [
            f"{report['shape']}, random weights, medians of {report['rounds']} rounds. "
            f"{machine_line(report)}. Versions: {about}.",
            "![Milliseconds per forward against rows per forward](performance.png)",
            *tables(report),
            *(f"Not measured: {name}: {why}." for name, why in report["missing"].items()),
        ],
        "**{}**",
    )


def save_plot(report: dict[str, Any], path: Path) -> None:
    """A panel per class of weights, at the smallest context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    classes = [c for c in CLASSES if any(r["class"] == c for r in report["results"])]
    figure, axes = pyplot.subplots(
        1, len(classes), figsize=(4.2 * len(classes), 4.2), sharey=True, squeeze=False
    )
    for axis, weight_class in zip(axes[0], classes, strict=True):
        rows = sorted({f["rows"] for r in report["results"] for f in r["forwards"]})
        results = [r for r in report["results"] if r["class"] == weight_class]
        context = min(f["context"] for r in results for f in r["forwards"])
        seen: dict[str, int] = {}
        for result in results:
            ms = milliseconds(result, context)
            index = seen[result["engine"]] = seen.get(result["engine"], -1) + 1
            axis.plot(
                list(ms),
                list(ms.values()),
                marker="o" if index == 0 else "s",
                markersize=4,
                linewidth=2.4 if result["engine"] == OURS else 1.4,
                color=_COLOURS[result["engine"]],
                alpha=1.0 if index == 0 else 0.55,
                label=f"{result['engine']} {result['weights']}",
            )
        for dtype, style in zip(CLASSES[weight_class], ("--", ":", "-.", "-"), strict=False):
            ms = floors(report, dtype, context)
            if ms:
                axis.plot(
                    list(ms), list(ms.values()), style, color="#555555", label=f"floor {dtype}"
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(rows, [str(n) for n in rows])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{weight_class}, KV {context}")
        axis.set_xlabel("rows per forward")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("ms per forward")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
