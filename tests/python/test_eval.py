"""`sbd-engine eval` on the demo model, against what Engine.generate gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from python.evaluating import FLAGS, GOOD, PROMPTS, evaluate, right, write
from python.tiny_model import write_tiny_model

from sbd_engine import Completion, Engine
from sbd_engine.evaluation.questions import read_prompts


@pytest.mark.parametrize("batch", [1, 3])
def test_figures_are_those_of_generate(
    batch: int,
    tasks: Path,
    by_decoder: dict[str, list[Completion]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = evaluate(capsys, "--tasks", tasks, *FLAGS, "--batch", batch, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["questions"] == report["answered"] == 5
    assert report["decoders"]["sbd"]["gamma"] == 1.5
    rows = {(row["family"], row["decoder"]): row for row in report["results"]}
    assert list(rows) == [(f, d) for f in ("first", "second", None) for d in ("ntp", "sbd")]
    questions = [json.loads(line) for line in tasks.read_text().splitlines()]
    for (family, decoder), row in rows.items():
        mine = [i for i, q in enumerate(questions) if family in (None, q["family"])]
        done = [by_decoder[decoder][i] for i in mine]
        hits = [right(questions[i]["answer"], c) for i, c in zip(mine, done, strict=True)]
        assert row["questions"] == len(mine)
        assert row["accuracy"]["value"] == sum(hits) / len(mine)
        tokens, nfe = sum(len(c.tokens) for c in done), sum(c.stats.nfe for c in done)
        assert row["tokens_per_forward"]["value"] == pytest.approx(tokens / nfe)
        for figure in ("accuracy", "tokens_per_forward", "speedup"):
            low, high = row[figure]["low"], row[figure]["high"]
            assert low <= row[figure]["value"] + 1e-9 and row[figure]["value"] <= high + 1e-9
        assert row["tok_s"] > 0
    assert rows["first", "sbd"]["accuracy"]["value"] == 1
    assert rows["second", "ntp"]["accuracy"]["value"] == 0.5
    all_rows = rows[None, "ntp"], rows[None, "sbd"]
    gap = all_rows[0]["accuracy"]["value"] - all_rows[1]["accuracy"]["value"]
    assert all_rows[1]["loss"]["value"] == pytest.approx(gap)
    assert all_rows[0]["speedup"]["value"] == all_rows[0]["tokens_per_forward"]["value"] == 1
    assert all_rows[1]["speedup"]["value"] == pytest.approx(
        all_rows[1]["tok_s"] / all_rows[0]["tok_s"]
    )


def test_for_people(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = evaluate(capsys, "--tasks", tasks, *FLAGS, "--families", "first")
    assert (code, err) == (0, "")
    assert "3 questions one at a time" in out
    words = " ".join(out.split())
    assert "sbd 100.0 43.9-100.0" in words
    assert "sbd beside ntp on the same questions: +" in words
    assert "x fewer forwards" in words


@pytest.mark.parametrize("columns", [80, 30])
def test_tables_keep_their_numbers(
    columns: int,
    by_decoder: dict[str, list[Completion]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And names are no markup, take one line and no more room than they are worth."""
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ["[/red]", "[bold]x[/bold]\x1b[31m\ny", "x" * 1000]
    tasks = tmp_path / "tasks.jsonl"
    write(tasks, [
        {"family": name, "prompt": prompt, "answer": done.text}
        for name, prompt, done in zip(names, PROMPTS, by_decoder["ntp"], strict=False)
    ])  # fmt: skip
    code, out, _ = evaluate(capsys, "--tasks", tasks, *FLAGS, "--decoder", "sbd_lossless")
    assert code == 0
    lines = out.split("\nsbd_lossless beside")[0].splitlines()[2:]
    assert [line.split()[-6:-4] for line in lines] == [
        ["ntp", "100.0"],
        ["sbd_lossless", "100.0"],
    ] * 4
    assert all(len(line.split()[-6:]) == 6 for line in lines)
    shown = [line.split("  ")[0] for line in lines[::2]]
    assert shown == ["[/red]", "[bold]x[/bold][31m y", "x" * 23 + "…", "all"]


def test_the_shipped_questions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = evaluate(capsys, "--limit", 1, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["tasks"] == "shipped"
    families = {row["family"] for row in report["results"]} - {None}
    assert len(families) == report["questions"] == 6


def test_limit_is_of_each_family(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = evaluate(capsys, "--tasks", tasks, *FLAGS, "--limit", 1, "--json")
    assert code == 0
    counts = [row["questions"] for row in json.loads(out)["results"] if row["decoder"] == "sbd"]
    assert counts == [1, 1, 2]


def test_an_answer_gets_its_length_and_16_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, answers = tmp_path / "tasks.jsonl", tmp_path / "answers.jsonl"
    write(tasks, [{"prompt": "def f(", "answer": "abc"}])
    # The model's own end would come too early.
    code, out, _ = evaluate(capsys, "--tasks", tasks, "--out", answers, "--json")
    assert code == 0
    with Engine() as engine:
        limit = len(engine.tokenizer.encode("abc", add_bos=False)) + 16
        expected = engine.generate("def f(", max_tokens=limit, decoder="ntp")
    ntp = json.loads(answers.read_text().splitlines()[1])
    assert (ntp["setting"], ntp["tokens"]) == ("ntp", len(expected.tokens))
    assert ntp["text"] == expected.text
    assert [row["family"] for row in json.loads(out)["results"]] == [None, None]


def test_a_byte_order_mark_is_no_part_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    line = b'\xef\xbb\xbf{"prompt": "x", "answer": "y"}\r\n'
    tasks.write_bytes(line + line)  # two such files, joined
    code, out, _ = evaluate(capsys, "--tasks", tasks, "--max-tokens", 2, "--json")
    assert (code, json.loads(out)["questions"]) == (0, 2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfdef f(\r\n")
    assert [question.prompt for question in read_prompts(prompts)] == ["def f("]


def test_another_decoder(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = evaluate(capsys, "--tasks", tasks, *FLAGS, "--decoder", "sbd_lossless", "--json")
    assert code == 0
    ntp, lossless = json.loads(out)["results"][-2:]
    assert lossless["decoder"] == "sbd_lossless"
    assert lossless["identical"]["value"] == 1
    assert lossless["accuracy"] == ntp["accuracy"]


def test_chat_puts_prompts_into_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tasks = write_tiny_model(tmp_path), tmp_path / "tasks.jsonl"
    out = tmp_path / "answers.jsonl"
    write(tasks, [{"prompt": "Hello", "answer": "x"}])
    flags = ["--tasks", tasks, "--max-tokens", 9, "--out", out, "--chat"]
    assert evaluate(capsys, model, *flags)[0] == 0
    with Engine(model) as engine:
        text = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        ids = engine.tokenizer.encode(text, add_bos=False)
        expected = engine.generate(ids, max_tokens=9, decoder="ntp")
        assert expected.text != engine.generate("Hello", max_tokens=9, decoder="ntp").text
    assert json.loads(out.read_text().split("\n")[1])["text"] == expected.text


def test_without_a_mask_token_it_is_ntp_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path, sbd=False)
    tasks = tmp_path / "tasks.jsonl"
    write(tasks, [{"prompt": "Hello", "answer": "x"}])
    call = [model, "--tasks", tasks, "--max-tokens", 4]
    code, out, err = evaluate(capsys, *call, "--json")
    assert code == 0
    assert [row["decoder"] for row in json.loads(out)["results"]] == ["ntp"]
    assert err.startswith("note: ")
    code, out, err = evaluate(capsys, *call, "--decoder", "sbd")
    assert (code, out) == (2, "") and "mask" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "flags", "complaint"),
    [
        (None, [], "tasks.jsonl: no such file"),
        (b"", [], "tasks.jsonl: expected a line with prompt and answer, got an empty file"),
        (b"\n \n", [], "empty file"),
        (b"\xff", [], "UTF-8"),
        (b'{"prompt": "x", "answer": "y"}\nx', [], "line 2: expected a JSON object, got no JSON"),
        (b"[1]", [], "line 1: expected a JSON object, got list"),
        (b"[" * 100_000, [], "line 1: expected a JSON object, got no JSON: brackets nested too"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", [], "got no JSON: a number of thousands of digits"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", [], '"prompt" as a string, got list'),
        (b'{"prompt": 1e400}', [], 'expected "prompt" as a string, got inf'),
        (b"{%s}" % b",".join(b'"k%d": 1' % i for i in range(9999)), [], "got only k0, k1, k2, k3"),
        (b'{"answer": "y"}', [], 'line 1: expected a "prompt", got only answer'),
        (b'{"prompt": "x"}', [], 'line 1: expected a "answer", got only prompt'),
        (b'{"prompt": "", "answer": "y"}', [], 'line 1: expected a "prompt" that is not empty'),
        (b'{"prompt": 5, "answer": "y"}', [], 'expected "prompt" as a string, got 5'),
        (b'{"prompt": "\\ud800", "answer": "y"}', [], "half a character"),
        ([GOOD, {"prompt": "x y" * 999, "answer": "y"}], [], "line 2: expected a prompt shorter"),
        ([GOOD], ["--families", "sort"], "unknown family 'sort'"),
        ([{**GOOD, "family": "sorting"}], ["--families", "sort"], "did you mean sorting?"),
        ([GOOD], ["--limit", 0], "--limit >= 1, got 0"),
        ([GOOD], ["--batch", 0], "--batch >= 1, got 0"),
        ([GOOD], ["--max-tokens", 0], "--max-tokens >= 1, got 0"),
        ([GOOD], ["--gamma", "nan"], "gamma >= 0, got nan"),
        ([GOOD], ["--gamma", "much"], "--gamma"),
        ([GOOD], ["--decoder", "sdb"], "sdb"),
        ([GOOD], ["--unmask", "all"], "entropy_bounded"),
        ([GOOD], ["--block-size", 10**6], "1000000"),
        ([GOOD], ["--chat"], "no chat template"),
        ([GOOD], ["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_input(
    content: Any,
    flags: list[Any],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "answers.jsonl"
    if isinstance(content, bytes):
        tasks.write_bytes(content)
    elif content is not None:
        write(tasks, content)
    code, printed, err = evaluate(capsys, "--tasks", tasks, "--out", out, *flags)
    assert (code, printed) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert complaint in err
    assert not out.exists()


def test_bad_models(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, complaint in ((tmp_path / "no.bin", "no such file"), (tmp_path, "folder")):
        code, out, err = evaluate(capsys, model, "--tasks", tasks)
        assert (code, out) == (2, "") and complaint in err
