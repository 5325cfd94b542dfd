"""`sbd-engine eval --out`: results that are kept, and runs that go on from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from python.evaluating import FLAGS, evaluate, timeless
from python.full_disk import full_disk

from sbd_engine import Completion, Engine


def settings_and(out: Path, *lines: bytes) -> None:
    """The first line of `out`, and these in place of its results."""
    head = out.read_bytes().split(b"\n")[0]
    out.write_bytes(b"\n".join([head, *lines]))


def test_what_can_be_read_is_read(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    settings_and(out, *lines[:3], *damage, lines[3][:-9])
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


def test_one_run_at_a_time(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "answers.jsonl"
    call = ["--tasks", tasks, "--max-tokens", 4, "--out", out]
    assert evaluate(capsys, *call)[0] == 0
    before = out.read_bytes()
    holder = (
        "import sys; from pathlib import Path; "
        "from sbd_engine.evaluation.locked_file import open_locked; "
        "file = open_locked(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-I", "-c", holder, str(out)]
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


def test_an_ended_run_goes_on(tmp_path: Path) -> None:
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
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_only_files(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim, link, pipe = tmp_path / "victim", tmp_path / "link", tmp_path / "pipe"
    victim.write_text("precious")
    link.symlink_to(victim)
    os.mkfifo(pipe)
    for out, complaint in ((link, "got a symbolic link"), (pipe, "got a pipe or a device")):
        code, _, err = evaluate(capsys, "--tasks", tasks, "--max-tokens", 2, "--out", out)
        assert code == 2 and f"{out}: expected a file, {complaint}" in err
    assert victim.read_text() == "precious"


def test_an_interrupted_run_goes_on(
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
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    call = ["--tasks", tasks, "--decoder", "sbd", "--max-tokens", 4, "--out", out]
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


def test_a_folder(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = evaluate(capsys, "--tasks", tasks, "--out", tmp_path)
    assert code == 2 and f"{tmp_path}: cannot be written" in err
    code, _, err = evaluate(capsys, "--tasks", tasks, "--out", tmp_path / "no" / "file")
    assert code == 2 and "cannot be written" in err
