"""Tables, for a terminal and for a page of docs/."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lineup import OURS


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]


def print_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    rich = RichTable(*table.header, box=None, padding=(0, 2, 0, 0))
    for column in rich.columns[1:]:
        column.justify = "right"
    for line in table.lines:
        rich.add_row(*line, style="bold" if line[0].startswith(OURS) else None)
    print(f"{table.title}")
    Console(highlight=False).print(rich)
    print()


def page(parts: Iterable[str | Table], heading: str = "") -> str:
    """Markdown: paragraphs and tables, each table behind its title where there is a form of
    headings; one without lines is its title."""
    paragraphs = []
    for part in parts:
        if isinstance(part, str):
            paragraphs.append(part)
            continue
        if heading:
            paragraphs.append(heading.format(part.title))
        if part.lines or not heading:
            paragraphs.append(_markdown(part))
    return "\n\n".join(paragraphs)


def _markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = ["---", *("---:" for _ in table.header[1:])]
    bold = [
        [f"**{c}**" if c and row[0].startswith(OURS) else c for c in row] for row in table.lines
    ]
    return "\n".join(line(cells) for cells in [table.header, rule, *bold])


def write_docs(path: Path, name: str, section: str) -> None:
    """Replaces what stands between the comments `name` and `/name` of a document."""
    text = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"error: {path}: expected the comments {begin} and {end}")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n\n{section}\n\n{end}{tail}")
