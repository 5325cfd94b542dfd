"""What decides the GPU's results page: the checks, the mix of forwards, exact weights; and the
whole script on a tiny shape, with the CPU and the emulated GPU in the GPU's place, and with what
may go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import dequantize

from sbd_engine.convert.mixes import mix_of
from sbd_engine.convert.quantize import encode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last, so that an installed package comes first

import cuda_agreement  # noqa: E402
import cuda_page  # noqa: E402
import cuda_stages  # noqa: E402
from cuda_agreement import Step, first_difference, is_choice, relative_error  # noqa: E402
from cuda_speed import mixed  # noqa: E402


def test_an_error_is_the_worst_rows_and_nan_is_infinite() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
    assert relative_error(expected, expected) == 0
    off = np.array([[0.0, 0.0], [0.0, 0.5]], np.float32)
    assert relative_error(expected + off, expected) == 0.5
    assert relative_error(expected * np.float32("nan"), expected) == np.inf


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_every_type_holds_the_weights_exactly(dtype: str) -> None:
    values = cuda_agreement._exact_values(3, (7, 256))
    stored = encode(values, mix_of(dtype).usual, "w")
    np.testing.assert_array_equal(dequantize(stored, mix_of(dtype).usual), values)
    assert np.abs(values).max() == 127 / 4096
    assert len(np.unique(values)) > 200


def test_first_difference() -> None:
    a = [Step([(1, 7)]), Step([(0, 5), (2, 6)]), Step([(3, 1)])]
    assert first_difference(a, list(a)) is None
    other = [a[0], Step([(0, 5)])]
    assert first_difference(a, other) == ({1: 7}, a[1], other[1])
    assert first_difference(a, a[:2]) == ({1: 7, 0: 5, 2: 6}, Step([]), Step([]))


def test_a_choice_is_the_highest_logit_but_the_masks() -> None:
    row = np.array([1.0, 9.0, 2.0, 1.5], np.float32)
    assert is_choice(row, 2, mask=1, slack=0)
    assert not is_choice(row, 3, mask=1, slack=0.25)
    assert is_choice(row, 3, mask=1, slack=0.5)


def test_blocks_of_two_kinds_average_the_forwards() -> None:
    block_s = {4: 1.0, 6: 2.0, 8: 4.0}
    assert mixed(block_s, 4) == 1
    assert mixed(block_s, 5.5) == pytest.approx(0.25 * 1 + 0.75 * 2)
    assert mixed(block_s, 7) == 3
    with pytest.raises(ValueError, match="expected 4 to 8 forwards per block, got 9"):
        mixed(block_s, 9)


def timed(dtype: str, ms: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {
            "stage": "forwards",
            "shape": "s",
            "type": dtype,
            "context": 1024,
            "rows": rows,
            "ms": each,
            "floor_ms": 4.0,
            "read_gb_s": 15000 / each,
            "peak_gb_s": 3000.0,
        }
        for rows, each in ms.items()
    ]


def test_checks() -> None:
    """Each bound from both sides."""
    speedups = [{"reduction": 3.0, "measured": 2.75, "formula": 2.9, "modelled": 2.95}]
    generation = {"shape": "s", "type": "bf16", "context": 256, "prefill_tok_s": 1, "ntp_tok_s": 1}
    tokens = {"stage": "agreement", "prompts": 200, "equal": 197, "ties": 2, "differing": []}
    errors = [
        {"stage": "agreement", "shape": "s", "case": case, "error": error, "bound": bound}
        for case, error, bound in (("f32", 2e-4, 1e-4), ("bf16", 1e-2, 2e-2))
    ]
    cells = [
        {"stage": "tests", "tests": 60, "failed": ["a", "b"], "ended": ""},
        {"stage": "memcheck", "tool": "memcheck", "tests": "x", "clean": True, "ended": "0 errors"},
        *errors,
        tokens,
        *timed("bf16", {1: 5.0, 32: 5.5, 64: 7.0}),
        *timed("q8_0", {1: 3.5}),
        {"stage": "generations", **generation, "batch": 1, "speedups": speedups},
        {"stage": "generations", **generation, "batch": 8, "missing": "too small"},
        {"stage": "tests", "ended": "failed: 2 tests failed: a, b", "seconds": 40.0},
    ]
    checks = [line[1:3] + line[4:] for line in next(cuda_page.tables(cells)).lines]
    assert checks == [
        ["58 of 60", "all", "NO"],
        ["0 errors", "clean", "yes"],
        ["2.0e-04", "<= 1.0e-04", "NO"],
        ["1.0e-02", "<= 2.0e-02", "yes"],
        ["199", ">= 200", "NO"],
        ["1.00", ">= 0.85", "yes"],
        ["1.10", "<= 1.15", "yes"],
        ["1.40", "<= 1.35", "NO"],
        ["0.70", "<= 0.60", "NO"],
        ["0.92", ">= 0.90", "yes"],
    ]
    nan = [{**errors[0], "error": float("nan")}]
    assert next(cuda_page.tables(nan)).lines[0][-1] == "NO"


def test_where_the_time_goes() -> None:
    kernels = [
        {"name": "norm", "calls": 2, "us": 20.0, "bytes": 0.0},
        {"name": "bf16 4 -> 8", "calls": 4, "us": 100.0, "bytes": 4e8},
    ]
    profile = {"graph_us": 130.0, "in_turn_us": 150.0, "matmuls_us": 90.0, "kernels": kernels}
    tables = list(cuda_page.tables([{"stage": "profile", "rows": 32, **profile}]))
    gaps, each = tables[2:]
    assert gaps.lines == [["32 rows", "0.130", "0.090", "0.040", "0.020", "0.120"]]
    assert each.lines == [
        ["bf16 4 -> 8", "4", "100", "25.0", "400.0", "4000"],
        ["norm", "2", "20", "10.0", "", ""],
    ]


def test_counters_of_ncu() -> None:
    said = """==PROF== Connected
"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"
"0","linear","(48, 5, 1)","gpu__time_duration.sum","ns","12,345"
"0","linear","(48, 5, 1)","lts__t_sector_hit_rate.pct","%","7.5"
"1","linear","(32, 8, 1)","gpu__time_duration.sum","ns","99"
"""
    assert cuda_stages.counters(said) == [
        {"grid": "(48, 5, 1)", "ns": 12345.0, "L2 hits %": 7.5},
        {"grid": "(32, 8, 1)", "ns": 99.0},
    ]
    assert cuda_stages.counters("no counters at all") == []


def quick(*flags: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", BENCHMARKS / "cuda_quick.sh", *flags],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages", "tests,speed"], "expected some of device, tests, forwards, "),
        (["--limit", "tests"], "expected STAGE=SECONDS, got 'tests'"),
        (["--total", "0"], "expected seconds above 0, got '0'"),
    ],
)
def test_a_bad_argument_is_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    done = quick("--out", tmp_path / "out", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def ends(out: Path) -> dict[str, str]:
    return {c["stage"]: c["ended"] for c in cuda_page.read(out / "results.jsonl") if "seconds" in c}


@pytest.mark.xdist_group("cpp")
def test_the_whole_of_it(binaries: Path, tmp_path: Path) -> None:
    emulated = binaries / "tests" / "cuda_emulation" / "sbd_cuda_emulated_tests"
    done = quick("--dry", "--out", tmp_path, "--tests", emulated)
    assert done.returncode == 0, done.stderr
    assert ends(tmp_path) == {
        "device": "ok",
        "tests": "ok",
        "forwards": "ok",
        "profile": ends(tmp_path)["profile"],
        "types": "ok",
        "generations": "ok",
        "agreement": "ok",
        "ncu": "missing: ncu",
        "memcheck": "missing: compute-sanitizer",
    }
    assert "profile: expected a device that runs kernels (cuda), got cpu (" in done.stdout
    cells = cuda_page.read(tmp_path / "results.jsonl")
    rows = {
        s: [c["rows"] for c in cells if c["stage"] == s and {"ms", "rows"} <= c.keys()]
        for s in ends(tmp_path)
    }
    assert rows["forwards"] == [1, 8, 16, 32, 64] and rows["types"] == [1, 32, 1, 32, 1, 32]
    assert [c["batch"] for c in cells if "speedups" in c] == [1, 2]
    errors = {c["case"]: c["error"] for c in cells if "case" in c}
    assert errors["f32"] == 0 and 0 < errors["q8_0"] < 0.05 and 0 < errors["bf16"] < 0.05
    page = (tmp_path / "results.md").read_text()
    assert page in done.stdout and page.startswith(
        "# Results on a GPU\n\nNo GPU: a dry run; commit not carried."
    )
    assert "| C++ tests | 1 of 1 | all |  | yes |" in page
    assert "## Forwards behind 24 positions; " in page


def test_what_goes_wrong_takes_nothing_else_along(tmp_path: Path) -> None:
    """A package that is missing, a stage that fails, one that takes too long, and no time left."""
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(\"No module named 'gguf'\")\n")
    failing = tmp_path / "tests"
    failing.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = "no such" ]; then echo "no test\'s name contains it" >&2; exit 1; fi\n'
        "echo '3 tests, 1 failed'; echo 'FAILED cuda_x' >&2; exit 1\n"
    )
    failing.chmod(0o755)
    sleeping = tmp_path / "compute-sanitizer"
    sleeping.write_text('#!/bin/sh\nif [ "$5" ] && [ "$6" = slow ]; then sleep 60; fi\n')
    sleeping.chmod(0o755)
    out = tmp_path / "out"
    done = quick(
        *("--dry", "--out", out, "--tests", failing, "--words", "fast,slow"),
        *("--stages", "forwards,tests,memcheck,device", "--limit", "memcheck=2", "--total", "60"),
        PYTHONPATH=str(tmp_path),
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert ends(out) == {
        "forwards": "missing: No module named 'gguf'",
        "tests": "failed: 1 tests failed: cuda_x",
        "memcheck": "stopped after 2 s",
        "device": "ok",
    }
    cells = cuda_page.read(out / "results.jsonl")
    assert [c["failed"] for c in cells if "failed" in c] == [["cuda_x"]]
    assert [c["tests"] for c in cells if "tool" in c] == ["fast"]  # before its time was up
    assert any("gpu" in c for c in cells)
    none = quick("--dry", "--out", out, "--stages", "device,tests", "--total", "0.5")
    assert set(ends(out).values()) == {"left out: no time was left"}, none.stdout
