"""The page of results: its text from hand-made numbers, and a whole run on a few questions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last, so that an installed package comes first

import results  # noqa: E402
import results_page  # noqa: E402

from sbd_engine.evaluation.answering import Result  # noqa: E402
from sbd_engine.evaluation.questions import Question  # noqa: E402
from sbd_engine.model_file import model_file  # noqa: E402


def estimate(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def figures(quality: float, tokens_per_forward: float, speedup: float = 1.0) -> dict[str, Any]:
    return {
        "quality": estimate(quality),
        "loss": estimate(0.9 - quality),
        "identical": estimate(0.5),
        "tokens_per_forward": estimate(tokens_per_forward, 0.1),
        "speedup": estimate(speedup, 0.1),
        "tok_s": 100.0,
    }


def point(size: int, gamma: float, quality: float, tokens: float) -> dict[str, Any]:
    fixed = {"block_size": size, "unmask": "entropy_bounded", "gamma": gamma}
    return {**fixed, **figures(quality, tokens)}


ROWS = [
    {
        "family": family,
        "ntp_only": figures(0.9, 1),
        "ntp": figures(0.89, 1),
        "low": figures(0.885, 3.0, 2.0),
        "high": figures(0.87, 4.0, 2.5),
    }
    for family in ("sort", None)
]
REPORT: dict[str, Any] = {
    "questions": 10,
    "curve_questions": 5,
    "families": ["sort"],
    "gammas": {"low": 0.1, "high": 0.4},
    "tuning": ROWS,
    "types": [
        {
            "type": "f32",
            "bytes": 3 << 20,
            "device": "cpu (avx2)",
            "threads": 2,
            "ms": {"1": 1.0, "8": 1.1, "16": 1.5},
            "families": ROWS,
        }
    ],
    "curves": {
        "block_size": 8,
        "ntp": figures(0.9, 1),
        "rows": [
            point(8, 0.0, 0.9, 1.0),
            point(8, 0.1, 0.895, 3.0),
            point(8, 0.4, 0.88, 4.0),
            *(
                {**figures(0.8, tokens), "block_size": 8, "unmask": "factor", "factor": factor}
                for factor, tokens in ((0.5, 2.0), (1.0, 3.0))
            ),
            point(4, 0.1, 0.9, 2.0),
            point(4, 0.4, 0.7, 2.5),
        ],
    },
}


def test_tables() -> None:
    text = results_page.sections(REPORT)
    assert text["tuning"].splitlines()[2] == (
        "| sort | 90.0 (88.0 to 92.0) | 89.0 (87.0 to 91.0) | -1.0 (-3.0 to +1.0) | "
        "88.5 (86.5 to 90.5) | 87.0 (85.0 to 89.0) |"
    )
    assert "| **all** | 3.00x (2.90 to 3.10) | 2.00x (1.90 to 2.10) | 4.00x " in text["tuning"]
    assert "SBD tuning cost NTP at most 1.0 points in any family" in text["tuning"]
    assert (
        "| 0.1 | 89.5 (87.5 to 91.5) | -0.5 (-2.5 to +1.5) | 3.00 (2.90 to 3.10) | 50.0 |"
        in (text["gamma"])
    )
    assert text["gamma"].endswith(
        "within 1 point of NTP: gamma 0.1 with 3.00 tokens per forward; "
        "within 3 points of NTP: gamma 0.4 with 4.00 tokens per forward."
    )
    rules = text["rules"].splitlines()
    assert rules[0].startswith("| right, % at tokens per forward | 2 | 3 | 4 | 5 | 6 | 7 | 8 |")
    assert rules[2].startswith("| entropy_bounded | 89.8 ± 2.0 | 89.5 ± 2.0 | 88.0 ± 2.0 |  | ")
    assert rules[3] == "| factor | 80.0 ± 2.0 | 80.0 ± 2.0 |  |  |  |  |  |"
    assert [line.split(" | ")[0] for line in text["blocks"].splitlines()[2:]] == ["| 4", "| 8"]
    assert "| f32 | 3.0 | 89.0 (87.0 to 91.0) | 100 |" in text["types"]
    # 8 * 1 / (1.5 + (8 / 3 - 1) * 1.1)
    assert "so 3.00 tokens per forward would be 2.40x the speed" in text["forwards"]
    assert "; `factor`: none; " in text["rules"]
    assert "points against the same weights decoded NTP, 3.00x fewer forwards (" in text["tuning"]


def test_interpolated() -> None:
    rows = [point(8, 0.4, 0.5, 4.0), point(8, 0.1, 0.9, 2.0)]
    assert results_page.interpolated(rows, 3.0) == pytest.approx((0.7, 0.02))
    assert results_page.interpolated(rows, 2.0) == pytest.approx((0.9, 0.02))
    assert results_page.interpolated(rows, 4.0) == pytest.approx((0.5, 0.02))
    assert results_page.interpolated(rows, 1.9) is None
    assert results_page.interpolated(rows, 4.1) is None


def test_no_gamma_within_a_point() -> None:
    worse = [{**row, "loss": estimate(0.02)} for row in REPORT["curves"]["rows"]]
    report = {**REPORT, "curves": {**REPORT["curves"], "rows": worse}}
    assert "within 1 point of NTP: none; within 3" in results_page.gamma_text(report)


def test_what_is_slower_than_ntp_is_none_to_take() -> None:
    careful = {**point(8, 0.0, 0.9, 0.96), "loss": estimate(0.0)}
    report = {**REPORT, "curves": {**REPORT["curves"], "rows": [careful]}}
    assert "within 1 point of NTP: none; within 3" in results_page.gamma_text(report)
    assert "`entropy_bounded`: none" in results_page.rules_text(report)


def test_families_are_compared_with_their_own_questions() -> None:
    questions = [Question("p", "a", family, "") for family in ("x", "y", "x")]
    before = [Result(i, "ntp", "a", 4, 4, 1.0, right, None) for i, right in enumerate([1, 0, 1])]
    after = [Result(i, "low", "a", 4, 2, 0.5, right, None) for i, right in enumerate([1, 1, 0])]
    rows = {row["family"]: row["low"] for row in results.table(questions, {"low": after}, before)}
    assert [rows[family]["quality"]["value"] for family in ("x", "y")] == [0.5, 1]
    assert [rows[family]["loss"]["value"] for family in ("x", "y")] == [0.5, -1]
    assert rows[None]["loss"]["value"] == 0
    assert rows[None]["tokens_per_forward"]["value"] == rows[None]["speedup"]["value"] == 2


def test_the_whole_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    tasks, docs = tmp_path / "tasks.jsonl", tmp_path / "docs"
    tasks.write_text('{"family": "a", "prompt": "def add(a, b):", "answer": "x"}\n')
    docs.mkdir()
    page = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    (docs / "results.md").write_text(page)
    monkeypatch.setattr(results, "DOCS", docs)
    with model_file(None) as demo:
        files = [x for f in ("--ntp-only", "--f32", "--q8-0", "--q4-0") for x in (f, str(demo))]
        flags = ["--tasks", str(tasks), "--work-dir", str(tmp_path / "work"), "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", ["results", *files, *flags, "--write-docs"])
        results.main()
        first = json.loads((tmp_path / "work" / "results.json").read_text())
        results.main()  # goes on from every answer
    again = json.loads((tmp_path / "work" / "results.json").read_text())
    assert again["curves"] == first["curves"]
    assert (docs / "results.png").stat().st_size > 10_000
    written = (docs / "results.md").read_text()
    for name in ("setup", "tuning", "gamma", "rules", "blocks", "types", "forwards"):
        section = written.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
        assert len(section.strip()) > 40, name
    assert "1 questions of 1 families" in written


def test_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["results", "--ntp-only", "a.bin"])
    with pytest.raises(SystemExit) as ended:
        results.arguments()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--q8-0" in error
