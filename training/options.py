"""Options that the command lines of this folder share."""

from __future__ import annotations

from typing import Annotated

import typer

Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of --epochs.")]
LearningRate = Annotated[float, typer.Option(help="Its peak.")]
WarmupSteps = Annotated[int, typer.Option(min=0, help="Steps up to the peak; a cosine follows.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices, by AdamW.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
