"""`sbd-engine sweep` on the demo model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.command import call_here, check_refused
from python.full_disk import full_disk
from python.tiny_model import write_tiny_model

from sbd_engine import Completion, Engine
from sbd_engine.cli import main
from sbd_engine.cli.sweep_report import commands
from sbd_engine.convert import convert
from sbd_engine.evaluation import plots
from sbd_engine.evaluation.sweeping import RULES
from sbd_engine.model_file import model_file

PROMPTS = ["def add(a, b):", "class Stack:", "import os", "def is_even(n):"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


@pytest.fixture
def tasks(engine: Engine, tmp_path: Path) -> Path:
    """NTP's own texts are the answers: it has all of them right."""
    path = tmp_path / "tasks.jsonl"
    done = [engine.generate(prompt, max_tokens=12, decoder="ntp") for prompt in PROMPTS]
    lines = [
        {"prompt": prompt, "answer": each.text} for prompt, each in zip(PROMPTS, done, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sweep(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return call_here(capsys, "sweep", *arguments)


def test_tasks(
    engine: Engine, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--gammas", "0,0.1,inf", "--unmask", "all", "--block-sizes", "4,8", "--max-tokens", 12]
    call = ["--tasks", tasks, *flags, "--batch", 4, "--json", "--out", out]
    code, printed, err = sweep(capsys, *call)
    assert code == 0
    report = json.loads(printed)
    assert report["quality"] == "right answers"
    assert json.loads((out / "sweep.json").read_text()) == report
    ntp, *rows = report["results"]
    assert ntp["decoder"] == "ntp"
    assert ntp["quality"]["value"] == ntp["identical"]["value"] == 1
    assert len(rows) == 2 * (3 + 7 + 7) + 4 + 7 + 1
    lossless = [r for r in rows if r["decoder"] == "sbd_lossless"]
    assert [r["identical"]["value"] for r in lossless] == [1]
    assert [r for r in rows if r["default"]] == lossless  # as the file says
    answers = [json.loads(line)["answer"] for line in tasks.read_text().splitlines()]
    names = ("decoder", "block_size", "unmask", *(rule.option for rule in RULES.values()))
    for each in rows[:-1:5]:  # how many forwards the last one takes is chosen anew each time
        options = {name: each[name] for name in names if name in each}
        if options.get("gamma") == "inf":
            options["gamma"] = float("inf")
        done = [engine.generate(p, max_tokens=12, **options) for p in PROMPTS]
        hits = [c.text.strip() == a.strip() for c, a in zip(done, answers, strict=True)]
        assert each["quality"]["value"] == sum(hits) / 4
        tokens, nfe = sum(len(c.tokens) for c in done), sum(c.stats.nfe for c in done)
        assert each["tokens_per_forward"]["value"] == pytest.approx(tokens / nfe)
    bounded = [r for r in rows if r.get("unmask") == "entropy_bounded"]
    assert [r["gamma"] for r in bounded] == [0, 0.1, "inf"] * 2
    assert bounded[0]["tokens_per_forward"]["value"] == 1
    assert (out / "sweep.png").is_file() == plots.installed()
    assert err == "" if plots.installed() else "matplotlib" in err
    assert {path.name for path in out.iterdir()} <= {"answers.jsonl", "sweep.json", "sweep.png"}


def agreement(engine: Engine, prompt: str, completion: Completion) -> int:
    """Token by token: would NTP, after what stands before it, have written this one?"""
    ids = engine.tokenizer.encode(prompt)
    return sum(
        engine.generate(ids + completion.tokens[:i], max_tokens=1, decoder="ntp").tokens == [token]
        for i, token in enumerate(completion.tokens)
    )


def test_prompts_agree_with_ntp(
    engine: Engine, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gammas", "0,inf", "--unmask", "entropy_bounded", "--block-sizes", 8]
    call = ["--prompts", prompts, *flags, "--max-tokens", 20]
    code, out, err = sweep(capsys, *call, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["quality"] == "agreement with ntp"
    assert report["questions"] == len(PROMPTS)
    ntp, *rows = report["results"]
    assert ntp["quality"]["value"] == ntp["identical"]["value"] == 1
    reference = [engine.generate(p, max_tokens=20, decoder="ntp") for p in PROMPTS]
    assert [agreement(engine, p, c) for p, c in zip(PROMPTS, reference, strict=True)] == [
        len(c.tokens) for c in reference
    ]
    bounded = [each for each in rows if "gamma" in each]
    assert len(bounded) == 2 and len(rows) == 3  # and sbd_lossless, which is what the file says
    for each in bounded:
        options = {"unmask": "entropy_bounded", "gamma": float(each["gamma"])}
        done = [
            engine.generate(p, max_tokens=20, decoder="sbd", block_size=8, **options)
            for p in PROMPTS
        ]
        agreed = sum(agreement(engine, p, c) for p, c in zip(PROMPTS, done, strict=True))
        assert each["quality"]["value"] == agreed / sum(len(c.tokens) for c in done)
        same = sum(c.text == r.text for c, r in zip(done, reference, strict=True))
        assert each["identical"]["value"] == same / 4
        assert each["loss"]["value"] == pytest.approx(1 - each["quality"]["value"])
    assert bounded[1]["quality"]["value"] < 1  # else this showed little


def test_what_is_recommended_can_be_applied(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways: list[dict[str, Any]] = [
        {"decoder": "sbd", "block_size": 5, "unmask": "entropy_bounded", "gamma": 0.25},
        {"decoder": "sbd", "block_size": 8, "unmask": "confidence", "confidence_threshold": 0.6},
        {"decoder": "sbd_lossless", "block_size": 4},
    ]
    for way in ways:
        model = tmp_path / "a model.bin"
        with model_file(None) as demo:
            model.write_bytes(demo.read_bytes())
        advice = commands({**way, "default": False}, model, engine)
        assert advice["set"]
        prompt = ["-p", PROMPTS[0], "--max-tokens", "9", "--json"]
        once = shlex.split(advice["command"])
        assert once[:2] == ["sbd-engine", "run"] and once[-2:] == ["-p", "..."]
        expected = engine.generate(PROMPTS[0], max_tokens=9, **way)
        for call in (once[1:-2], shlex.split(advice["set"])[1:], ["run", str(model)]):
            assert main.run([*call, *(prompt if call[0] == "run" else [])]) == 0
            out = capsys.readouterr().out
            if call[0] == "run":
                done = json.loads(out)
                assert (done["tokens"], done["stats"]["nfe"]) == (
                    expected.tokens,
                    expected.stats.nfe,
                )
    default = {"decoder": "sbd", "block_size": 8, "unmask": "factor", "factor": 0.5}
    assert commands({**default, "default": True}, Path("m.bin"), engine) == {
        "command": "sbd-engine run m.bin -p '...'",
        "set": None,
    }
    # The installation's own model stays as it is.
    assert commands({**ways[0], "default": False}, None, engine)["set"] is None


def test_a_recommendation_is_never_slower_than_ntp(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"def f{i}(" + "\n" for i in range(20)))
    flags = ["--gammas", "0,inf", "--unmask", "entropy_bounded", "--max-loss", 100]
    code, out, _ = sweep(capsys, "--prompts", prompts, *flags, "--max-tokens", 8, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["evidence"]["enough"]
    best, rows = report["recommended"], report["results"][1:]
    fast = [r for r in rows if r["speedup"]["value"] >= 1 and r["tokens_per_forward"]["value"] > 1]
    if fast:
        assert best["speedup"]["value"] >= 1 and best["tokens_per_forward"]["value"] > 1
    else:
        assert (best, report["reason"]) == (None, "slower")


def test_two_questions_are_too_few(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--unmask", "factor", "--max-tokens", 12, "--limit", 2]
    report = json.loads(sweep(capsys, "--tasks", tasks, *flags, "--json")[1])
    assert not report["evidence"]["enough"] and report["evidence"]["needed"] == 381
    best = report["recommended"]
    assert best is None or best["decoder"] == "sbd_lossless"
    assert report["reason"] in ("evidence", "slower")


@pytest.mark.parametrize("columns", [80, 40])
def test_tables_keep_their_numbers(
    columns: int,
    prompts: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for source in (["--tasks", tasks], ["--prompts", prompts]):
        flags = ["--unmask", "confidence", "--block-sizes", 4, "--max-tokens", 2]
        code, out, _ = sweep(capsys, *source, *flags)
        assert code == 0
        assert "…" not in out
        table = [line.rstrip() for line in out.split("\n* ")[0].splitlines()[1:]]
        assert all(len(line) <= 80 for line in table)
        assert len(table) == 1 + 1 + 7 + 1  # each row is one line
        assert all(len(line.split()) in (6, 7, 8) for line in table[1:])


def test_an_interrupted_sweep_goes_on(
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--gammas", "0.1,1", "--unmask", "entropy_bounded", "--block-sizes", 16, "--batch", 2]
    call = ["--prompts", prompts, *flags, "--max-tokens", 8, "--json"]
    whole = json.loads(sweep(capsys, *call)[1])
    calls: list[int] = []
    generate_batch = Engine.generate_batch

    def counted(self: Engine, prompts: Any) -> list[Completion]:
        calls.append(len(prompts))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return generate_batch(self, prompts)

    monkeypatch.setattr(Engine, "generate_batch", counted)
    out = tmp_path / "out"
    code, printed, err = sweep(capsys, *call, "--out", out)
    assert code == 130
    partial = json.loads(printed)
    assert [each["questions"] for each in partial["results"]] == [2] * 4
    assert "interrupted after 2 of 4 questions" in err
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]

    code, printed, _ = sweep(capsys, *call, "--out", out)
    assert code == 0
    assert calls == [2] * 9  # eight batches in all, one of them tried twice
    for before, after in zip(whole["results"], json.loads(printed)["results"], strict=True):
        for key in ("quality", "identical", "loss"):
            assert before[key] == after[key]
        if before["decoder"] != "sbd_lossless":  # it chooses anew
            assert before["tokens_per_forward"] == after["tokens_per_forward"]
    code, _, err = sweep(capsys, *call[:-1], "--gammas", "0.1,2", "--out", out)
    assert code == 2 and "holds results with decoders block_size 16, gamma 1 " in err


def test_without_matplotlib(
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "installed", lambda: False)
    out = tmp_path / "out"
    code, _, err = sweep(
        capsys, "--prompts", prompts, "--unmask", "factor", "--max-tokens", 2, "--out", out
    )
    assert code == 0
    assert err == "note: no plot: it needs matplotlib (pip install 'sbd-engine[plot]')\n"
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "sweep.json"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--gammas", "0,x"], "expected --gammas as numbers >= 0 with commas, got '0,x'"),
        (["--gammas", ""], "--gammas"),
        (["--gammas", "nan"], "--gammas"),
        (["--gammas=-1"], "--gammas"),
        (["--gammas", "0", "--unmask", "factor"], "--gammas is of entropy_bounded, which --unmask"),
        (["--score", "contains"], "expected --score or --prompts, got both"),
        (["--unmask", "factor,bold"], "unknown unmask 'bold': expected one of entropy_bounded, "),
        (["--block-sizes", "8,0"], "expected --block-sizes as integers >= 1 with commas"),
        (["--block-sizes", "8;16"], "'8;16'"),
        (["--block-sizes", 10**6], "block_size 1000000"),
        (["--max-loss", -1], "--max-loss from 0 to 100 points, got -1"),
        (["--max-loss", "nan"], "--max-loss"),
        (["--batch", 0], "--batch >= 1, got 0"),
        (["--limit", 0], "--limit >= 1, got 0"),
        (["--max-tokens", 0], "--max-tokens >= 1, got 0"),
        (["--tasks", "tasks.jsonl"], "expected --tasks or --prompts, got both"),
        (["--out", __file__], "expected a folder"),
        (["--temperature", 1], "--temperature"),
    ],
)
def test_bad_input(
    flags: list[Any], complaint: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(sweep(capsys, "--prompts", prompts, *flags), complaint)


def test_bad_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    check(sweep(capsys, "--prompts", text), "no such file")
    check(sweep(capsys, "--prompts", tmp_path), "cannot be read")
    text.write_text("\n \n")
    check(sweep(capsys, "--prompts", text), "expected a line with prompt, got an empty file")
    lines.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    check(sweep(capsys, "--prompts", lines), 'line 2: expected a "prompt", got only text')
    lines.write_text("x\n")
    check(sweep(capsys, "--prompts", lines), "line 1: expected a JSON object, got no JSON")


def test_a_model_without_a_mask_token(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path, sbd=False)
    out = tmp_path / "out"
    check(sweep(capsys, model, "--prompts", prompts, "--out", out), "mask")
    assert not out.exists()


def test_the_recommended_file_keeps_its_other_decoders(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)
    names = ["decoders=nemotron,nemotron_spec,sbd,ntp"]
    convert(tmp_path / "checkpoint", model, type="f32", settings=names, block_size=4)
    way = {"decoder": "sbd", "block_size": 4, "unmask": "factor", "factor": 0.1, "default": False}
    with Engine(model) as engine:
        advice = commands(way, model, engine)
    assert "--decoder sbd" in advice["command"]
    assert advice["set"] and advice["set"].endswith(" sbd.decoders=sbd,nemotron,nemotron_spec,ntp")


class TestOut:
    FLAGS = ("--unmask", "factor", "--max-tokens", 2)

    def test_links_are_not_followed(
        self, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, victim = tmp_path / "out", tmp_path / "victim"
        out.mkdir()
        victim.write_text("precious")
        for name in ("sweep.json", "sweep.json.part", "sweep.png", "sweep.part.png"):
            (out / name).symlink_to(victim)
        assert sweep(capsys, "--prompts", prompts, *self.FLAGS, "--out", out)[0] == 0
        assert victim.read_text() == "precious"
        assert not (out / "sweep.json").is_symlink()
        (out / "answers.jsonl").unlink()
        (out / "answers.jsonl").symlink_to(victim)
        done = sweep(capsys, "--prompts", prompts, *self.FLAGS, "--out", out)
        check(done, "answers.jsonl: expected a file, got a symbolic link")
        assert victim.read_text() == "precious"

    def test_a_disk_that_is_full(
        self, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        call = ["--prompts", prompts, *self.FLAGS, "--out", out]
        assert sweep(capsys, *call)[0] == 0
        before = (out / "sweep.json").read_text()
        with full_disk(1000):
            check(sweep(capsys, *call), "sweep.json: cannot be written: File too large")
        assert (out / "sweep.json").read_text() == before
        assert not [path for path in out.iterdir() if path.name.endswith(".part")]


def test_a_model_without_a_block_size(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path)
    settings = ["decoders=dream", "prompt_attention=full", "commit_attention=none"]
    convert(tmp_path / "checkpoint", model, type="f32", settings=settings)
    call = [model, "--prompts", prompts, "--gammas", "0.1", "--max-tokens", 4]
    complaint = "sweep decodes with sbd; this file names dream and no block size: give --block-"
    check(sweep(capsys, *call), complaint)
    assert sweep(capsys, *call, "--block-sizes", 4)[0] == 0


def check(done: tuple[int, str, str], complaint: str) -> None:
    code, out, err = done
    lines = err.splitlines(keepends=True)
    plot = "note: no plot: it needs matplotlib"
    check_refused((code, out, "".join(x for x in lines if not x.startswith(plot))), complaint)
