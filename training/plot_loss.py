"""Draw a run's loss curve: `python -m training.plot_loss demo_hf/training.json -o loss.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="training.json of the run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()

    run = json.loads(args.run.read_text(encoding="utf-8"))
    tokens = [point["step"] * run["recipe"]["batch_tokens"] / 1e6 for point in run["loss"]]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label in (("ntp", "next token"), ("matp", "masked tokens of a block")):
        axes.plot(tokens, [point[key] for point in run["loss"]], label=label)
    axes.set_xlabel("clean tokens seen, millions")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
