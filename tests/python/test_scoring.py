"""When an answer is right, and what can be scored at all."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from python.evaluating import GOOD, PROMPTS, evaluate, write
from python.tiny_model import write_tiny_model

from sbd_engine import Completion, Engine
from sbd_engine.cli import main
from sbd_engine.evaluation.scoring import check_answer, is_right


def test_of_a_file_and_of_a_task(
    by_decoder: dict[str, list[Completion]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks, text = tmp_path / "tasks.jsonl", by_decoder["ntp"][0].text.strip()
    assert len(text) > 4
    part, pattern = text[1:-1], re.escape(text[:2]) + "(?s:.)*" + re.escape(text[-2:]) + "$"
    lines = [
        {"answer": part},
        {"answer": part, "score": "exact"},
        {"answer": pattern, "score": "regex"},
        {"answer": "-17", "score": "last_number"},
    ]
    write(tasks, [{"prompt": PROMPTS[0], **line} for line in lines])

    def hits(*flags: object) -> list[bool]:
        out = tmp_path / "answers.jsonl"
        out.unlink(missing_ok=True)
        call = ["--tasks", tasks, "--max-tokens", 24, "--decoder", "ntp", "--out", out, *flags]
        assert evaluate(capsys, *call)[0] == 0
        return [json.loads(line)["right"] for line in out.read_text().splitlines()[1:]]

    assert hits("--score", "contains") == [True, False, True, False]
    assert hits() == [False, False, True, False]


def test_more_than_an_exact_answer_may_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tasks = write_tiny_model(tmp_path), tmp_path / "tasks.jsonl"
    write(tasks, [{"prompt": "x", "answer": "y", "score": s} for s in ("exact", "contains")])
    out = tmp_path / "answers.jsonl"
    call = [model, "--tasks", tasks, "--decoder", "ntp", "--out", out]
    assert evaluate(capsys, *call)[0] == 0
    found = [json.loads(line)["text"] for line in out.read_text().splitlines()[1:]]
    with Engine(model) as engine:
        expected = [engine.generate("x", max_tokens=n, decoder="ntp") for n in (17, 256)]
    assert found == [each.text for each in expected]
    assert len(found[0]) < len(found[1])


@pytest.mark.parametrize(
    ("score", "text", "answer", "right"),
    [
        ("exact", " 42\n", "42", True),
        ("exact", "42.", "42", False),
        ("contains", "so it is Paris, I think", " Paris ", True),
        ("contains", "so it is paris", "Paris", False),
        ("regex", "so it is paris", "(?i)\\bPARIS\\b", True),
        ("regex", "comparison", "\\bparis\\b", False),
        ("regex", "ab\ncd", "^cd$", False),
        ("regex", "ab\ncd", "(?m)^cd$", True),
        ("last_number", "first 3, then 4: 42.0", "42", True),
        ("last_number", "it costs $1,234,567.", "#### 1234567", True),
        ("last_number", "3 and 5,6", "6", True),
        ("last_number", "x = -5", "-5", True),
        ("last_number", "x = \u22125", "-5", True),
        ("last_number", "pages 10-5", "5", True),
        ("last_number", "on 2024-05-06", "6", True),
        ("last_number", "0.1 + 0.2 is 0.3", "0.30", True),
        ("last_number", "about 1.5e3", "1500", True),
        ("last_number", "none", "42", False),
        ("last_number", "9" * 5000, "9" * 5000, True),
        ("last_number", "9" * 5000, "9" * 4999 + "8", False),
        ("last_number", "1e999", "1e998", False),
    ],
)
def test_by_hand(score: str, text: str, answer: str, right: bool) -> None:
    check_answer(score, answer)
    assert is_right(score, text, answer) is right


def test_no_pattern_and_no_text_takes_long() -> None:
    text = "a" * 100_000 + "!"
    started = time.process_time()
    for pattern in (
        "(a+)+$",
        "(a|a)*$",
        "((((a*)*)*)*)*b",
        "(a?){500}a{500}b",
        "(.*)(.*)(.*)x",
    ):
        is_right("regex", text, pattern)
    for many in ("1" * 100_000, "1," * 50_000, "111," * 30_000, "-" * 100_000):
        is_right("last_number", many, "1")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"score": "fuzzy"}, "line 1: unknown score 'fuzzy': expected one of exact, contains"),
        ({"score": 5}, "line 1: expected score as a string, got 5"),
        ({"score": "last_number"}, "line 1: expected a number in \"answer\", got 'y'"),
        (
            {"score": "regex", "answer": "("},
            "as a regular expression of RE2, got '(': missing )",
        ),
        ({"score": "regex", "answer": "(?=a)"}, "invalid perl operator"),
        ({"score": "regex", "answer": "(a)\\1"}, "invalid escape sequence"),
        ({"score": "regex", "answer": "((x{999}){999}){999}"}, "invalid repetition size"),
        ({"score": "regex", "answer": "x" * 1001}, "at most 1000 characters"),
    ],
)
def test_what_cannot_be_scored(
    line: dict[str, Any],
    complaint: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    write(tasks, [{**GOOD, **line}])
    assert main.run(["eval", "--tasks", str(tasks)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert complaint in err


def test_an_unknown_score(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = evaluate(capsys, "--tasks", tasks, "--score", "regexp")
    assert code == 2 and "unknown --score 'regexp': did you mean regex?" in err
