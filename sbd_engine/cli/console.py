"""What goes to a terminal: no colour where there is none, and tables that keep their numbers,
however narrow it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import console, table

_ANY_WIDTH = 10_000


class Console(console.Console):
    """One that colours nothing by itself, and whose reader may leave."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - main ends it, as with any other output


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal; it is told how many are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeRemaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemaining())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


class Table(table.Table):
    """Columns of numbers; those in `words` have words."""

    def __init__(self, *columns: str, words: tuple[str, ...] = ()) -> None:
        super().__init__(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in columns:
            self.add_column(column, justify="left" if column in words else "right")


def print_table(table: Table) -> None:
    """As wide as what is in it: a narrower terminal breaks its lines, all of them at one place."""
    Console(width=_ANY_WIDTH).print(table)
