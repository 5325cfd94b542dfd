"""The result of results.py for people: the tables of docs/results.md, and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from page import Table, page

from sbd_engine.evaluation import plots
from sbd_engine.evaluation.intervals import forwards, gain
from sbd_engine.evaluation.sweeping import RULES
from sbd_engine.roofline import implied_speedup

TARGETS = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # tokens per forward at which rules are compared
Figures = dict[str, Any]


def sections(report: dict[str, Any]) -> dict[str, str]:
    """Markdown by the name of the comment it stands behind."""
    return {
        "setup": setup(report),
        "tuning": page([tuning_table(report), speed_table(report), tuning_text(report)]),
        "gamma": page([gamma_table(report), gamma_text(report)]),
        "rules": page([rules_table(report), rules_text(report)]),
        "blocks": page([blocks_table(report)]),
        "types": page([types_table(report)]),
        "forwards": page([forwards_table(report), forwards_text(report)]),
    }


def setup(report: dict[str, Any]) -> str:
    first, gammas = report["types"][0], report["gammas"]
    each = report["questions"] // len(report["families"])
    return (
        f"{report['questions']} questions of {len(report['families'])} families, {each} each; the "
        f"curves of many settings use {report['curve_questions']} of them. Blocks of "
        f"{report['curves']['block_size']}, entropy-bounded unless it says otherwise, gamma low "
        f"{gammas['low']:g}, high {gammas['high']:g}. {first['threads']} threads, "
        f"{first['device']}."
    )


# Table 1


def tuning_table(report: dict[str, Any]) -> Table:
    """The paper's Table 1: right answers in percent."""
    lines = [
        [
            family(row),
            percent(row["ntp_only"]["quality"]),
            percent(row["ntp"]["quality"]),
            gain(row["ntp"]["loss"]),
            percent(row["low"]["quality"]),
            percent(row["high"]["quality"]),
        ]
        for row in report["tuning"]
    ]
    header = ["right answers, %", "NTP-trained", "SBD-trained, decoded NTP", "difference"]
    return Table("tuning", [*header, *(f"SBD, {gamma}" for gamma in named_gammas(report))], lines)


def speed_table(report: dict[str, Any]) -> Table:
    """What SBD gains there, over the same weights decoded NTP."""
    lines = [
        [family(row)]
        + [
            times(row[name][figure])
            for name in ("low", "high")
            for figure in ("tokens_per_forward", "speedup")
        ]
        for row in report["types"][0]["families"]
    ]
    low, high = named_gammas(report)
    header = ["", f"{low}: fewer forwards", "speed", f"{high}: fewer forwards", "speed"]
    return Table("speed", header, lines)


def tuning_text(report: dict[str, Any]) -> str:
    whole = overall(report["types"][0])
    shares = []
    for name in ("low", "high"):
        figures = whole[name]
        shares.append(
            f"at gamma {report['gammas'][name]:g} {gain(figures['loss'])} points against the "
            f"same weights decoded NTP, {forwards(figures['tokens_per_forward'])} and "
            f"{times(figures['speedup'])} the speed"
        )
    lows = [row["ntp"]["loss"]["value"] for row in report["tuning"] if row["family"] is not None]
    worst = max(lows)
    return (
        f"Over all questions, {'; '.join(shares)} (float32, one question at a time). SBD tuning "
        f"cost NTP at most {100 * max(worst, 0):.1f} points in any family."
    )


# The gamma figure, the rules, the block sizes


def gamma_table(report: dict[str, Any]) -> Table:
    curves = report["curves"]
    lines = [["NTP", percent(curves["ntp"]["quality"]), "", "1", ""]]
    for row in curve(report, curves["block_size"], "entropy_bounded"):
        lines.append(
            [
                f"{row['gamma']:g}",
                percent(row["quality"]),
                gain(row["loss"]),
                times(row["tokens_per_forward"], ""),
                f"{100 * row['identical']['value']:.1f}",
            ]
        )
    header = ["gamma", "right, %", "beside NTP", "tokens per forward", "text as NTP's, %"]
    return Table("gamma", header, lines)


def gamma_text(report: dict[str, Any]) -> str:
    rows = curve(report, report["curves"]["block_size"], "entropy_bounded")
    parts = []
    for limit in (1, 3):
        best = boldest(rows, limit / 100)
        if best:
            parts.append(
                f"within {limit} point{'s' if limit > 1 else ''} of NTP: gamma {best['gamma']:g} "
                f"with {best['tokens_per_forward']['value']:.2f} tokens per forward"
            )
        else:
            parts.append(f"within {limit} point{'s' if limit > 1 else ''} of NTP: none")
    return f"Most tokens per forward {'; '.join(parts)}."


def rules_table(report: dict[str, Any]) -> Table:
    """Accuracy at equal NFE: between two settings of a rule, on the straight line between them."""
    size = report["curves"]["block_size"]
    curves = {rule: curve(report, size, rule) for rule in RULES}
    lines = []
    for rule, rows in curves.items():
        cells = [interpolated(rows, target) for target in TARGETS]
        shown = ["" if c is None else f"{100 * c[0]:.1f} ± {100 * c[1]:.1f}" for c in cells]
        lines.append([rule, *shown])
    header = ["right, % at tokens per forward", *(f"{target:g}" for target in TARGETS)]
    return Table("rules", header, lines)


def rules_text(report: dict[str, Any]) -> str:
    """What each rule reaches for a point of accuracy."""
    parts = []
    for rule in RULES:
        best = boldest(curve(report, report["curves"]["block_size"], rule), 0.01)
        if best:
            option = RULES[rule].option
            parts.append(
                f"`{option} {best[option]:g}`: {percent(best['quality'])} % right, "
                f"{forwards(best['tokens_per_forward'])}, {times(best['speedup'])} the speed"
            )
        else:
            parts.append(f"`{rule}`: none")
    return f"The boldest setting of each rule within 1 point of NTP: {'; '.join(parts)}."


def boldest(rows: Sequence[Figures], max_loss: float) -> Figures | None:
    """Of most tokens per forward, more than NTP's one, within the loss."""
    fit = [
        row
        for row in rows
        if row["loss"]["value"] <= max_loss + 1e-12 and row["tokens_per_forward"]["value"] > 1
    ]
    return max(fit, key=lambda row: row["tokens_per_forward"]["value"], default=None)


def interpolated(rows: Sequence[Figures], target: float) -> tuple[float, float] | None:
    """Quality and half its interval where a curve has `target` tokens per forward; None beyond
    its ends."""
    known = sorted(
        (
            row["tokens_per_forward"]["value"],
            row["quality"]["value"],
            (row["quality"]["high"] - row["quality"]["low"]) / 2,
        )
        for row in rows
    )
    for (x0, *left), (x1, *right) in pairwise(known):
        if x0 <= target <= x1:
            t = (target - x0) / (x1 - x0) if x1 > x0 else 0.0
            value, margin = (a + t * (b - a) for a, b in zip(left, right, strict=True))
            return value, margin
    return None


def blocks_table(report: dict[str, Any]) -> Table:
    gammas = [report["gammas"][name] for name in ("low", "high")]
    lines = []
    for size in sorted({row["block_size"] for row in report["curves"]["rows"]}):
        rows = {row["gamma"]: row for row in curve(report, size, "entropy_bounded")}
        lines.append([str(size), *(cell for gamma in gammas for cell in cells(rows[gamma]))])
    return Table("blocks", ["block size", *headings(report)], lines)


# The types, and time


def types_table(report: dict[str, Any]) -> Table:
    lines = []
    for each in report["types"]:
        whole = overall(each)
        lines.append(
            [
                each["type"],
                f"{each['bytes'] / 2**20:.1f}",
                percent(whole["ntp"]["quality"]),
                f"{whole['ntp']['tok_s']:.0f}",
                *cells(whole["low"]),
                *cells(whole["high"]),
            ]
        )
    header = ["weights", "MiB", "NTP: right, %", "tok/s"]
    return Table("types", [*header, *headings(report)], lines)


def forwards_table(report: dict[str, Any]) -> Table:
    rows = list(report["types"][0]["ms"])
    lines = [[each["type"], *(f"{each['ms'][n]:.3f}" for n in rows)] for each in report["types"]]
    return Table("forwards", ["ms per forward of rows", *rows], lines)


def forwards_text(report: dict[str, Any]) -> str:
    """The speedup that the forwards' times allow, by the paper's formula."""
    size = report["curves"]["block_size"]
    parts = []
    for each in report["types"]:
        ms = {int(rows): value for rows, value in each["ms"].items()}
        whole = overall(each)
        nfe = whole["low"]["tokens_per_forward"]["value"]
        if {1, size, 2 * size} <= ms.keys():
            parts.append(
                f"{each['type']}: {size} rows cost {ms[size] / ms[1]:.2f} and {2 * size} rows "
                f"{ms[2 * size] / ms[1]:.2f} times one, so {nfe:.2f} tokens per forward would be "
                f"{implied_speedup(ms, size, nfe):.2f}x the speed in an endless text, "
                f"{whole['low']['speedup']['value']:.2f}x was measured"
            )
    return "; ".join(parts) + "."


# Text


def curve(report: dict[str, Any], block_size: int, rule: str) -> list[Figures]:
    return [
        row
        for row in report["curves"]["rows"]
        if (row["block_size"], row["unmask"]) == (block_size, rule)
    ]


def overall(each: dict[str, Any]) -> dict[str, Any]:
    """A type's figures over all families."""
    return next(row for row in each["families"] if row["family"] is None)


def family(row: dict[str, Any]) -> str:
    return "**all**" if row["family"] is None else str(row["family"])


def named_gammas(report: dict[str, Any]) -> list[str]:
    return [f"gamma {report['gammas'][name]:g}" for name in ("low", "high")]


def headings(report: dict[str, Any]) -> list[str]:
    return [
        text
        for gamma in named_gammas(report)
        for text in (f"{gamma}: right, %", "fewer forwards", "speed")
    ]


def cells(figures: Figures) -> list[str]:
    """Under `headings`."""
    forwards, speed = figures["tokens_per_forward"], figures["speedup"]
    return [percent(figures["quality"]), brief(forwards), times(speed)]


def brief(estimate: Figures) -> str:
    return f"{estimate['value']:.2f}x"


def percent(estimate: Figures) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def times(estimate: Figures, unit: str = "x") -> str:
    return f"{estimate['value']:.2f}{unit} ({estimate['low']:.2f} to {estimate['high']:.2f})"


# The plot


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Rules in the model's block size, and gamma in all block sizes."""
    curves = report["curves"]
    figure, (left, right) = plots.panels(2, (6.2, 4.6))
    for axis in (left, right):
        plots.draw_reference(axis, curves["ntp"])
    for rule, colour in zip(RULES, plots.COLOURS, strict=False):
        rows = curve(report, curves["block_size"], rule)
        plots.draw_curve(left, rows, rule, colour, "gamma" if "gamma" in rows[0] else None)
    title = f"unmasking rules in blocks of {curves['block_size']}, gamma beside its points"
    plots.finish(left, title, "right answers, %")
    sizes = sorted({row["block_size"] for row in curves["rows"]})
    for size, colour in zip(sizes, plots.COLOURS, strict=False):
        rows = curve(report, size, "entropy_bounded")
        note = "gamma" if size == curves["block_size"] else None
        plots.draw_curve(right, rows, f"blocks of {size}", colour, note)
    plots.finish(right, "block sizes, entropy-bounded", "")
    plots.save(figure, path)
