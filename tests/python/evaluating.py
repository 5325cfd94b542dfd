"""What tests of `sbd-engine eval` share: questions to the demo model, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sbd_engine import Completion

from .command import call_here

PROMPTS = ["def add(a, b):", "class Stack:", "import os\n", "def is_even(n):", "for i in range("]
OPTIONS: dict[str, Any] = {"gamma": 1.5, "max_tokens": 24}
FLAGS = ["--decoder", "sbd", "--gamma", 1.5, "--max-tokens", 24]
GOOD = {"prompt": "x", "answer": "y"}


def write(path: Path, objects: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return call_here(capsys, "eval", *arguments)


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {key: value for key, value in row.items() if key not in ("tok_s", "speedup")}
        for row in report["results"]
    ]
    return {**report, "results": rows}


def right(answer: str, completion: Completion) -> bool:
    return completion.text.strip() == answer.strip()
