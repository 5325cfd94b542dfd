"""What a sweep found, for people: its table, and what to do about it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import experiment

if TYPE_CHECKING:
    from ..engine import Engine


def commands(row: dict[str, Any], model: Path | None, engine: Engine) -> dict[str, str | None]:
    """How to decode that way: once, and from now on (None: the file says it already, or it is the
    installation's own)."""
    from ..evaluation.sweeping import RULES

    flags: list[str] = []
    keys: list[str] = []
    if not row["default"]:
        if "unmask" in row:
            rule = RULES[row["unmask"]]
            value = f"{float(row[rule.option]):.12g}"
            flags += [f"--{rule.option.replace('_', '-')}", value]
            keys.append(f"{rule.key}={value}")
            if row["unmask"] != engine.defaults["unmask"]:
                flags += ["--unmask", row["unmask"]]
                keys.append(f"sbd.unmask={row['unmask']}")
        if row.get("block_size", engine.defaults["block_size"]) != engine.defaults["block_size"]:
            flags += ["--block-size", str(row["block_size"])]
            keys.append(f"sbd.block_size={row['block_size']}")
        if row["decoder"] != engine.auto_decoder:
            flags += ["--decoder", row["decoder"]]
            others = [name for name in engine.defaults["decoders"] if name != row["decoder"]]
            keys.append(f"sbd.decoders={','.join([row['decoder'], *others])}")
    file = [] if model is None else [str(model)]
    lasting = shlex.join(["sbd-engine", "set", *file, *keys]) if file and keys else None
    return {
        "command": f"{shlex.join(['sbd-engine', 'run', *file, *flags])} -p '...'",
        "set": lasting,
    }


def print_report(report: dict[str, Any]) -> None:
    from .console import Console, Table, print_table

    console = Console(markup=False)
    experiment.print_heading(console, report)
    if not report["results"]:
        return
    agreement = report["quality"] != "right answers"
    table = Table(
        *("setting", "block", "agree %" if agreement else "right %", "95 %"),
        *(("identical %",) if agreement else ()),
        "tok/forward",
        *(() if agreement else ("95 %",)),
        "x ntp",
        words=("setting",),
    )
    best = report["recommended"]
    for row in report["results"]:
        table.add_row(
            _label(row) + ("*" if row.get("default") else ""),
            str(row.get("block_size", "")),
            f"{100 * row['quality']['value']:.1f}",
            experiment.span(row["quality"], 100, ".1f", "-"),
            *((f"{100 * row['identical']['value']:.1f}",) if agreement else ()),
            f"{row['tokens_per_forward']['value']:.2f}",
            *(() if agreement else (experiment.span(row["tokens_per_forward"], 1, ".2f", "-"),)),
            f"{row['speedup']['value']:.2f}",
            style="bold" if best and _setting(row) == _setting(best) else None,
        )
    print_table(table)
    if any(row.get("default") for row in report["results"]):
        console.print("* what the file says")
    for line in _advice(report):  # a command is copied: it has no line ends of its own
        console.print(line, soft_wrap=line.startswith(" "))


def _advice(report: dict[str, Any]) -> list[str]:
    best, nearest, limit = report["recommended"], report["nearest"], report["max_loss"]
    lines = []
    if best:
        lines.append(f"recommended: {_described(best, f', {limit:g} allowed')}")
        lines.append(f"  now:         {best['command']}")
        if best["set"]:
            lines.append(f"  in the file: {best['set']}")
    reason = report["reason"]
    if reason == "ntp is never right":
        lines.append("nothing can be recommended: ntp has none of these right")
    elif reason == "slower":
        lines.append(
            "nothing is recommended: no setting is faster than ntp here: the fastest is "
            f"{_described(nearest)}"
        )
    elif reason == "loss":
        lines.append(
            f"nothing is recommended: what is as fast as ntp loses more than {_points(limit)}, the "
            f"least {_described(nearest)}; --max-loss allows more"
        )
    elif reason == "evidence":
        lines += _evidence(report)
    return lines


def _evidence(report: dict[str, Any]) -> list[str]:
    known, nearest = report["evidence"], report["nearest"]
    what = "questions" if report["quality"] == "right answers" else "prompts"
    if known["needed"] is None:
        enough = "no number of them shows that nothing is lost"
    else:
        enough = (
            f"it takes about {known['needed']} to show one of at most {_points(report['max_loss'])}"
        )
    others = "any other setting" if report["recommended"] else "a setting"
    lines = [
        f"too little data to recommend {others}: {known['questions']} {what} can hide a loss of "
        f"{_points(100 * known['hidden_loss'], '.1f')}, {enough}; --max-loss allows more"
    ]
    best = report["recommended"]
    if best is None or _setting(nearest) != _setting(best):
        lines.append(f"foremost so far: {_described(nearest)}")
    return lines


def _label(row: dict[str, Any]) -> str:
    from ..evaluation.sweeping import label

    return label(row)


def _points(count: float, form: str = "g") -> str:
    return f"{count:{form}} point{'s' if count != 1 else ''}"


def _setting(row: dict[str, Any]) -> tuple[str, int | None]:
    return _label(row), row.get("block_size")


def _described(row: dict[str, Any], allowed: str = "") -> str:
    from ..evaluation.sweeping import LOSSLESS

    blocks = f" in blocks of {row['block_size']}" if "block_size" in row else ""
    speedup, loss = row["speedup"], row["loss"]
    if row["decoder"] == LOSSLESS:
        lost = "nothing lost"
    else:
        lost = (
            f"{100 * loss['value']:.1f} points lost ({experiment.span(loss, 100, '.1f')}){allowed}"
        )
    return (
        f"{_label(row)}{blocks}: {row['tokens_per_forward']['value']:.2f} tokens per forward, "
        f"{speedup['value']:.2f}x ntp's speed ({experiment.span(speedup, 1, '.2f')}), {lost}"
    )
