"""What the command lines of this folder share: who speaks, how a run shows itself, how it ends."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.errors import AnotherRunError, TrainingError
from training.interruption import Interruption
from training.trainer import Point, Recipe, Report, Trainer, described, print_progress

# Typer does not export it.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
ERROR_EXIT, SIGNAL_EXIT = 2, 128  # plus the signal's number


def speaks() -> bool:
    """Whether this process is the first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def say(line: str) -> None:
    if speaks():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def ending(debug: bool, flags: Mapping[str, str]) -> Iterator[ExitStack]:
    """Ends a command's body: one line for an error, exit codes, and the processes let go. `flags`:
    what a run depends on, by the option that says it. What enters the stack is left as well."""
    stack = ExitStack()
    try:
        yield stack
    except (TrainingError, OSError) as error:
        if debug:
            traceback.print_exc()
        line = error.told(flags) if isinstance(error, AnotherRunError) else str(error)
        say(f"error: {' '.join(line.split())}")
        raise typer.Exit(ERROR_EXIT) from None
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from the last save")
        raise typer.Exit(SIGNAL_EXIT + signal.SIGINT) from None
    finally:
        stack.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def train(trainer: Trainer, save_every: int) -> None:
    """Runs it to its end, showing how it goes; Ctrl-C saves and exits."""
    with _progress(trainer) as report, Interruption(speaks()) as interruption:
        trainer.run(save_every, min(10, save_every), report, interruption.asked)
    if not trainer.done:
        say(
            f"interrupted: step {trainer.step} of {trainer.recipe.steps} is saved in {trainer.out}:"
            " the same command goes on from there"
        )
        raise typer.Exit(SIGNAL_EXIT + (interruption.signal or signal.SIGINT))


@contextmanager
def _progress(trainer: Trainer) -> Iterator[Report]:
    """A bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield print_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=trainer.recipe.steps, completed=trainer.step)

        def report(point: Point, recipe: Recipe) -> None:
            text = f"{described(point)}, {point['tok_s']:.0f} tok/s"
            progress.update(task, completed=point["step"], description=text)

        yield report


def main_of(function: Callable[..., Any]) -> Callable[..., None]:
    """A program of one command."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(function)

    def main(arguments: list[str] | None = None) -> None:
        """A wrong option is one line too, and the same exit code."""
        try:
            code = app(arguments, standalone_mode=False)
        except UsageError as error:
            print(f"error: {error.format_message()}", file=sys.stderr)
            code = ERROR_EXIT
        sys.exit(code)

    return main
