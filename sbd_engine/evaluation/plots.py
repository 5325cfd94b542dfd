"""Quality against tokens per forward, with 95 % intervals. matplotlib is loaded on first use."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COLOURS = ("#0b6e4f", "#c0392b", "#2c5fa8", "#e08e0b", "#7d3c98", "#16828c", "#7f6a4d", "#555555")


def installed() -> bool:
    return find_spec("matplotlib") is not None


def panels(count: int, size: tuple[float, float] = (6.4, 4.4)) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(size[0] * count, size[1]), sharey=True, squeeze=False
    )
    return figure, axes[0]


def draw_curve(
    axis: Any,
    rows: Sequence[dict[str, Any]],
    label: str,
    colour: str,
    note: str | None = None,
) -> None:
    """A line through the rows. note: the option whose value stands beside each point."""
    x, x_error = _with_errors(rows, "tokens_per_forward", 1)
    y, y_error = _with_errors(rows, "quality", 100)
    axis.errorbar(
        x,
        y,
        xerr=x_error,
        yerr=y_error,
        label=label,
        color=colour,
        marker="o",
        markersize=4,
        linewidth=1.6,
        ecolor=(colour, 0.4),
        elinewidth=0.8,
        capsize=1.5,
    )
    for row, at in zip(rows, zip(x, y, strict=True), strict=True):
        if note:
            axis.annotate(
                f"{float(row[note]):g}",
                at,
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )


def draw_reference(axis: Any, row: dict[str, Any], label: str = "ntp") -> None:
    """NTP: a level with its interval."""
    quality = row["quality"]
    axis.axhline(100 * quality["value"], color="#555555", linestyle="--", linewidth=1, label=label)
    axis.axhspan(
        100 * quality["low"], 100 * quality["high"], color="#555555", alpha=0.12, linewidth=0
    )


def draw_mark(axis: Any, row: dict[str, Any], shape: str, label: str) -> None:
    """Around a row's point."""
    at = row["tokens_per_forward"]["value"], 100 * row["quality"]["value"]
    axis.plot(*at, shape, markersize=9, fillstyle="none", color="black", label=label)


def finish(axis: Any, title: str, quality: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("tokens per forward")
    axis.set_ylabel(quality)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, loc="best")


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _with_errors(
    rows: Sequence[dict[str, Any]], key: str, scale: float
) -> tuple[list[float], list[list[float]]]:
    values = [scale * row[key]["value"] for row in rows]
    # Rounding may put an end a hair inside the value: matplotlib takes no negative length.
    below = [max(0.0, scale * (row[key]["value"] - row[key]["low"])) for row in rows]
    above = [max(0.0, scale * (row[key]["high"] - row[key]["value"])) for row in rows]
    return values, [below, above]
