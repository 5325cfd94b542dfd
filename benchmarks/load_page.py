"""The result of serving_load.py for people: tables, a plot, a section of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_loop import GOOD_SHARE, PERCENTILES, sustained
from page import Table, page

_COLOURS = ("#c0392b", "#0b6e4f", "#2c5fa8", "#e08e0b")


def tables(report: dict[str, Any]) -> Iterator[Table]:
    speed = ["tok/s", "tok/forward"]
    yield Table(
        "Clients that wait for their answers",
        ["clients", "decoder", "requests/s", *speed],
        [
            [f"{line['clients']}", line["decoder"], f"{line['requests_per_s']:.1f}", *speeds(line)]
            for line in report["waiting"]
        ],
    )
    yield Table(
        "Requests that come when they come",
        ["requests/s", "decoder", "asked", "refused", "lost", "good/s", *speed],
        [
            [
                *(f"{line['rate']:g}", line["decoder"]),
                *(str(line[name]) for name in ("requests", "refused", "lost")),
                *(f"{line['good_per_s']:.1f}", *speeds(line)),
            ]
            for line in report["open"]
        ],
    )
    which = " / ".join(map(str, PERCENTILES))
    yield Table(
        f"Their times: percentiles {which} of whole answers",
        ["requests/s", "decoder", "first token, ms", "per further token, ms", "all of it, s"],
        [
            [
                *(f"{line['rate']:g}", line["decoder"], shown(line["first"], 1e3, 0)),
                *(shown(line["per_token"], 1e3, 1), shown(line["total"], 1, 2)),
            ]
            for line in report["open"]
        ],
    )


def speeds(line: dict[str, Any]) -> list[str]:
    return [f"{line['tokens_per_s']:.0f}", f"{line['tokens_per_forward']:.2f}"]


def shown(percentiles: list[float] | None, scale: float, digits: int) -> str:
    if percentiles is None:
        return "-"
    return " / ".join(f"{scale * value:.{digits}f}" for value in percentiles)


def by_decoder(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in report["open"]:
        lines.setdefault(line["decoder"], []).append(line)
    return lines


def sustained_line(report: dict[str, Any]) -> str:
    limits = report["limits"]
    said = []
    for decoder, lines in by_decoder(report).items():
        rate = sustained(lines)
        said.append(f"{decoder} {'none of these rates' if rate is None else f'{rate:g}/s'}")
    late = max(line["late"][-1] for line in report["open"])
    return (
        f"An answer is good whose first token came within {1e3 * limits['first']:.0f} ms and the "
        f"others within {1e3 * limits['per_token']:.0f} ms each in the mean. Kept up with, "
        f"{GOOD_SHARE:.0%} of the answers good at this rate and at all lower ones: "
        f"{', '.join(said)}. {PERCENTILES[-1]} % of the requests were sent within "
        f"{1e3 * late:.0f} ms of when they were due."
    )


def docs_section(report: dict[str, Any]) -> str:
    return page(
        [
            f"{report['model']}, {report['threads']} threads, {report['seconds']} s of arrivals "
            f"at each rate, rounds: {report['rounds']}, seed {report['seed']}. "
            f"{sustained_line(report)}",
            "![Good answers and times against requests a second](serving_load.png)",
            *tables(report),
        ],
        "**{}**",
    )


def save_plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arriving = report["seconds"] * report["rounds"]
    figure, (good, first, each) = pyplot.subplots(1, 3, figsize=(12.6, 4.0))
    came = {line["rate"]: line["requests"] / arriving for line in report["open"]}
    good.plot(list(came), list(came.values()), ":", color="#555555", label="asked")
    for colour, (decoder, lines) in zip(_COLOURS, by_decoder(report).items(), strict=False):
        asked = [line["rate"] for line in lines]
        good.plot(asked, [line["good_per_s"] for line in lines], "o-", color=colour, label=decoder)
        for axis, name in ((first, "first"), (each, "per_token")):
            for n, style in enumerate(("-", "--", ":")):
                values = [1e3 * line[name][n] if line[name] else None for line in lines]
                label = f"{decoder}, {PERCENTILES[n]}%"
                axis.plot(asked, values, f"o{style}", color=colour, markersize=4, label=label)
    limits = report["limits"]
    for axis, name in ((first, "first"), (each, "per_token")):
        axis.axhline(1e3 * limits[name], color="#555555", linewidth=0.8, label="limit")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    good.set_title("good answers a second")
    first.set_title("ms to the first token")
    each.set_title("ms per further token")
    for axis in (good, first, each):
        axis.set_xlabel("requests a second")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
