"""`sbd-engine eval` on the demo model, against what Engine.generate gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from python.full_disk import full_disk
from python.tiny_model import write_tiny_model

from sbd_engine import Completion, Engine
from sbd_engine.cli import main
from sbd_engine.evaluation.questions import read_prompts
from sbd_engine.evaluation.scoring import check_answer, is_right

PROMPTS = ["def add(a, b):", "class Stack:", "import os\n", "def is_even(n):", "for i in range("]
OPTIONS: dict[str, Any] = {"gamma": 1.5, "max_tokens": 24}
FLAGS = ["--gamma", 1.5, "--max-tokens", 24]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def by_decoder(engine: Engine) -> dict[str, list[Completion]]:
    return {
        "ntp": [engine.generate(p, max_tokens=24, decoder="ntp") for p in PROMPTS],
        "sbd": [engine.generate(p, decoder="sbd", **OPTIONS) for p in PROMPTS],
    }


@pytest.fixture(scope="module")
def tasks(
    by_decoder: dict[str, list[Completion]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two families: of the first, the answers are SBD's; of the second, NTP's and one of nobody."""
    answers = [done.text for done in by_decoder["sbd"][:3]]
    answers += [by_decoder["ntp"][3].text, "nobody's answer"]
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    write(path, [
        {"family": "first" if i < 3 else "second", "prompt": prompt, "answer": f"\n{answer} "}
        for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ])  # fmt: skip
    return path


def write(path: Path, objects: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main.run(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {key: value for key, value in row.items() if key not in ("tok_s", "speedup")}
        for row in report["results"]
    ]
    return {**report, "results": rows}


def right(answer: str, completion: Completion) -> bool:
    return completion.text.strip() == answer.strip()


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
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, answers = tmp_path / "tasks.jsonl", tmp_path / "answers.jsonl"
    write(tasks, [{"prompt": "def f(", "answer": "abc"}])
    # The model's own end would come too early.
    code, out, _ = evaluate(capsys, "--tasks", tasks, "--out", answers, "--json")
    assert code == 0
    limit = len(engine.tokenizer.encode("abc", add_bos=False)) + 16
    expected = engine.generate("def f(", max_tokens=limit, decoder="ntp")
    ntp = json.loads(answers.read_text().splitlines()[1])
    assert (ntp["setting"], ntp["tokens"]) == ("ntp", len(expected.tokens))
    assert ntp["text"] == expected.text
    assert [row["family"] for row in json.loads(out)["results"]] == [None, None]


class TestScores:
    def test_of_a_file_and_of_a_task(
        self,
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
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    def test_by_hand(self, score: str, text: str, answer: str, right: bool) -> None:
        check_answer(score, answer)
        assert is_right(score, text, answer) is right

    def test_no_pattern_and_no_text_takes_long(self) -> None:
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
        self,
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

    def test_an_unknown_score(self, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = evaluate(capsys, "--tasks", tasks, "--score", "regexp")
        assert code == 2 and "unknown --score 'regexp': did you mean regex?" in err


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


class TestOut:
    def settings_and(self, out: Path, *lines: bytes) -> None:
        """The first line of `out`, and these in place of its results."""
        head = out.read_bytes().split(b"\n")[0]
        out.write_bytes(b"\n".join([head, *lines]))

    def test_what_can_be_read_is_read(
        self, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "answers.jsonl"
        call = ["--tasks", tasks, "--max-tokens", 24, "--decoder", "ntp", "--out", out, "--json"]
        whole = json.loads(evaluate(capsys, *call)[1])
        head, *lines = out.read_bytes().splitlines()
        other = json.loads(lines[3])
        damage = [
            head,  # as of two runs at once
            lines[0][:20] + lines[1][30:],
            b'{"question": 2}',
            b'{"settings": {"model": "x"}}',
            json.dumps({**other, "run": "0" * 12}).encode(),
            json.dumps({**other, "question": 99}).encode(),
            json.dumps({**other, "text": None}).encode(),
            b"\xff\x00",
            b"[" * 100_000,
        ]
        self.settings_and(out, *lines[:3], *damage, lines[3][:-9])
        code, printed, err = evaluate(capsys, *call)
        assert code == 0
        assert err == "note: --out: 9 lines left out: cut off, damaged, or of another run\n"
        assert timeless(json.loads(printed)) == timeless(whole)
        answers = out.read_bytes().splitlines()
        assert len(answers) == 1 + 3 + len(damage) + 2  # the last two questions, once more
        kept = json.loads(answers[1]), json.loads(answers[3])
        assert kept == (json.loads(lines[0]), json.loads(lines[2]))
        # A file without its last line's end is whole; one without its head is still this run's.
        out.write_bytes(b"\n".join(lines))
        code, printed, err = evaluate(capsys, *call)
        assert (code, err) == (0, "")
        assert timeless(json.loads(printed)) == timeless(whole)
        assert out.read_bytes() == b"\n".join([*lines, head, b""])

    def test_one_run_at_a_time(
        self, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "answers.jsonl"
        call = ["--tasks", tasks, "--max-tokens", 4, "--out", out]
        assert evaluate(capsys, *call)[0] == 0
        before = out.read_bytes()
        holder = (
            "import sys; from pathlib import Path; "
            "from sbd_engine.evaluation.locked_file import open_locked; "
            "file = open_locked(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-P", "-c", holder, str(out)]
        if sys.version_info < (3, 11):
            command.remove("-P")
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
        ) as other:
            assert other.stdout and other.stdout.readline() == b"\n"
            code, printed, err = evaluate(capsys, *call)
            assert (code, printed) == (2, "")
            assert err.startswith(f"error: {out}: process {other.pid} (python")
            assert "is writing there: wait until it has ended" in err and err.count("\n") == 1
            other.communicate()
        assert out.read_bytes() == before
        assert evaluate(capsys, *call)[0] == 0

    def test_an_ended_run_goes_on(self, tmp_path: Path) -> None:
        """SIGTERM, as a shutting machine sends it."""
        out, command = tmp_path / "answers.jsonl", Path(sys.executable).with_name("sbd-engine")
        call = [str(command), "eval", "--out", str(out), "--json"]
        with subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        ) as run:
            while not out.exists() or out.read_bytes().count(b"\n") < 20:
                assert run.poll() is None
                time.sleep(0.02)
            run.terminate()
            printed, err = run.communicate()
        assert run.returncode == 130
        answered = json.loads(printed)["answered"]
        assert f"interrupted after {answered} of 1200 questions; kept in {out}" in err
        lines = out.read_text().splitlines()
        assert len(lines) - 1 >= 2 * answered
        assert all(json.loads(line) for line in lines)

    def test_a_disk_that_is_full(
        self, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "answers.jsonl"
        call = ["--tasks", tasks, *FLAGS, "--out", out, "--json"]
        with full_disk(300):
            code, printed, err = evaluate(capsys, *call)
        assert (code, printed) == (2, "")
        assert f"{out}: cannot be written: File too large; it has 0 answers" in err
        assert not out.exists()
        with full_disk(1500):
            code, printed, err = evaluate(capsys, *call)
        assert (code, printed) == (2, "") and err.count("\n") == 1
        lines = out.read_text().splitlines()
        assert f"it has {len(lines) - 1} answers: the same command goes on" in err
        assert len(lines) > 2
        code, printed, err = evaluate(capsys, *call)
        assert (code, err) == (0, "")
        assert json.loads(printed)["answered"] == 5

    def test_only_files(
        self, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        victim, link, pipe = tmp_path / "victim", tmp_path / "link", tmp_path / "pipe"
        victim.write_text("precious")
        link.symlink_to(victim)
        os.mkfifo(pipe)
        for out, complaint in ((link, "got a symbolic link"), (pipe, "got a pipe or a device")):
            code, _, err = evaluate(capsys, "--tasks", tasks, "--max-tokens", 2, "--out", out)
            assert code == 2 and f"{out}: expected a file, {complaint}" in err
        assert victim.read_text() == "precious"

    def test_an_interrupted_run_goes_on(
        self,
        tasks: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out = tmp_path / "answers.jsonl"
        call = ["--tasks", tasks, *FLAGS, "--json"]
        whole = json.loads(evaluate(capsys, *call)[1])

        asked: list[str] = []
        generate_batch = Engine.generate_batch
        stop_at = 6

        def counted(self: Engine, prompts: Any) -> list[Completion]:
            if len(asked) == stop_at:
                raise KeyboardInterrupt
            asked.extend(each["decoder"] for each in prompts)
            return generate_batch(self, prompts)

        monkeypatch.setattr(Engine, "generate_batch", counted)
        code, printed, err = evaluate(capsys, *call, "--out", out)
        assert code == 130
        assert json.loads(printed)["answered"] == 3
        assert f"interrupted after 3 of 5 questions; kept in {out}" in err
        assert len(out.read_text().splitlines()) == 1 + 6
        assert asked == ["ntp", "sbd", "sbd", "ntp", "ntp", "sbd"]  # the other one first each time

        with out.open("a") as file:  # a line that was cut off in the middle
            file.write('{"question": 3, "sett')
        stop_at = 1000
        code, printed, _ = evaluate(capsys, *call, "--out", out)
        assert code == 0
        assert len(asked) == 10
        assert timeless(json.loads(printed)) == timeless(whole)

        code, again, _ = evaluate(capsys, *call, "--out", out)
        assert (code, len(asked)) == (0, 10)
        assert json.loads(again) == json.loads(printed)  # times too: nothing was run

    def test_other_settings_are_refused(
        self, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "answers.jsonl"
        call = ["--tasks", tasks, "--max-tokens", 4, "--out", out]
        assert evaluate(capsys, *call, "--gamma", 0.5)[0] == 0
        before = out.read_bytes()
        for other in (["--gamma", 0.25], ["--gamma", 0.5, "--limit", 1], ["--threads", 1]):
            code, printed, err = evaluate(capsys, *call, *other)
            assert (code, printed) == (2, "")
            assert str(out) in err and "another file" in err and err.count("\n") == 1
            if "0.25" in map(str, other):
                assert "holds results with decoders sbd gamma 0.5, this run has 0.25: " in err
        assert out.read_bytes() == before
        out.write_text("a file of my own\n")
        code, _, err = evaluate(capsys, *call, "--gamma", 0.5)
        assert code == 2 and "move it away" in err
        assert out.read_text() == "a file of my own\n"

    def test_a_folder(
        self, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = evaluate(capsys, "--tasks", tasks, "--out", tmp_path)
        assert code == 2 and f"{tmp_path}: cannot be written" in err
        code, _, err = evaluate(capsys, "--tasks", tasks, "--out", tmp_path / "no" / "file")
        assert code == 2 and "cannot be written" in err


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


GOOD = {"prompt": "x", "answer": "y"}


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
