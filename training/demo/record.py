"""The record of a run, `python -m training.demo.record DIR`: `run.json` and `loss.png`, here."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.demo.train import PROCESSES

STAGES = {"ntp": "next tokens alone", "sbd": "Set Block Decoding"}
LOSSES = {"ntp": "next token", "matp": "masked tokens of a block"}
POINTS = 40  # kept of a loss curve


def thinned(curve: list[dict[str, float]]) -> dict[str, list[float]]:
    """Each loss at POINTS steps, the mean since the step before."""
    size = -(-len(curve) // POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    means = {
        key: [round(sum(point[key] for point in group) / len(group), 3) for group in groups]
        for key in LOSSES
        if key in curve[0]
    }
    return {"step": [group[-1]["step"] for group in groups], **means}


def record(runs: Path) -> dict[str, Any]:
    stages = {}
    for stage in STAGES:
        summary = json.loads((runs / stage / "training.json").read_text(encoding="utf-8"))
        stages[stage] = {**summary, "loss": thinned(summary["loss"])}
    return {"python": platform.python_version(), "replicas": PROCESSES, **stages}


def as_lines(value: Any, indent: str = "") -> str:
    """JSON, a list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + " "
    items = (f"{inner}{json.dumps(key)}: {as_lines(v, inner)}" for key, v in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def draw(run: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (stage, title) in zip(panels, STAGES.items(), strict=True):
        recipe, curve = run[stage]["recipe"], run[stage]["loss"]
        per_step = run["replicas"] * recipe["batch_size"] * recipe["length"] / 1e6
        for key, label in LOSSES.items():
            if key in curve:
                axes.plot([step * per_step for step in curve["step"]], curve[key], label=label)
        axes.set_title(title)
        axes.set_xlabel("clean tokens seen, millions")
        axes.set_ylim(0, 3)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("cross-entropy, nats per token")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder given to training.demo as --out")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    run = record(args.runs)
    (args.into / "run.json").write_text(as_lines(run) + "\n", encoding="utf-8")
    draw(run, args.into / "loss.png")


if __name__ == "__main__":
    main()
