"""A sample of the fuzzers, of which `benchmarks/long.sh` runs all; that of model files is in
test_cpp.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZERS = Path(__file__).parents[1] / "fuzz"


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        *(("tokenizers", 400), ("templates", 60), ("requests", 150), ("checkpoints", 60)),
        ("grammars", 150),
    ],
)
def test_a_sample(name: str, rounds: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FUZZERS / f"fuzz_{name}.py", "--rounds", str(rounds)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{rounds} rounds: " in done.stdout
    assert " 0 failed" in done.stdout
    assert "'done'" in done.stdout
