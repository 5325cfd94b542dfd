"""Draw a run's loss curve: `python -m training.plot_loss OUT/training.json -o loss.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def plot_loss(run: Path, out: Path) -> None:
    summary = json.loads(run.read_text(encoding="utf-8"))
    recipe, curve = summary["recipe"], summary["loss"]
    tokens = [point["step"] * recipe["batch_size"] * recipe["length"] / 1e6 for point in curve]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label in (("ntp", "next token"), ("matp", "masked tokens of a block")):
        if key in curve[0]:
            axes.plot(tokens, [point[key] for point in curve], label=label)
    axes.set_xlabel("clean tokens seen, millions")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="training.json of the run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    plot_loss(args.run, args.out)


if __name__ == "__main__":
    main()
