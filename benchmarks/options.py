"""Command lines: a problem is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from sbd_engine import SbdError
from sbd_engine.convert.comma_list import ascending, parsed

WORK_DIR = Path(__file__).parent.parent / "build" / "benchmarks"
DOCS = Path(__file__).parent.parent / "docs"


class Parser(argparse.ArgumentParser):
    """With what all benchmarks take."""

    def __init__(self, description: str, rounds: int) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--rounds", type=at_least(1), default=rounds, help="medians are over")
        self.add_argument(
            "--threads",
            type=at_least(1),
            default=len(os.sched_getaffinity(0)),
            help="of every engine",
        )
        self.add_argument(
            "--work-dir", type=_folder, default=str(WORK_DIR), help="model files, results, logs"
        )
        self.add_argument("--write-docs", action="store_true", help="put the result into docs/")

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def offer_plain_llama(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plain-llama",
        action="store_true",
        help="llama.cpp without layouts of its own, where its AMX code cannot run",
    )


def run(main: Callable[[], None]) -> None:
    """A command's whole life: what goes wrong is one line too."""
    try:
        main()
    except (OSError, RuntimeError, SbdError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _folder(text: str) -> Path:
    path = Path(text).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return path


def at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer >= {low}, got {text!r}")
        return value

    return parse


def integers(low: int) -> Callable[[str], list[int]]:
    def parse(text: str) -> list[int]:
        return list(ascending(text, at_least(low), low))

    return parse


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """In the order of `names`."""

    def parse(text: str) -> list[str]:
        wanted = parsed(text, str)
        for name in wanted:
            if name not in names:
                expected = ", ".join(names)
                raise argparse.ArgumentTypeError(f"expected some of {expected}, got {name!r}")
        return [name for name in names if name in wanted]

    return parse
