"""`sbd-engine sweep` on the demo model, and how it comes to its recommendation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.tiny_model import write_tiny_model

from sbd_engine import Completion, Engine
from sbd_engine.cli import main
from sbd_engine.convert import convert
from sbd_engine.evaluation import plots
from sbd_engine.evaluation.sweeping import GAMMAS, RULES, grid, recommend

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
    code = main.run(["sweep", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# What is recommended


def row(gamma: float, quality: float, tokens_per_forward: float, **changes: Any) -> dict[str, Any]:
    return {
        "unmask": "entropy_bounded",
        "gamma": gamma,
        "quality": {"value": quality},
        "loss": {"value": 0.9 - quality},
        "tokens_per_forward": {"value": tokens_per_forward},
        **changes,
    }


NTP = {"quality": {"value": 0.9}, "loss": {"value": 0.0}, "tokens_per_forward": {"value": 1.0}}


def test_recommended_is_the_fastest_within_the_loss() -> None:
    rows = [
        NTP,
        row(0.0, 0.9, 1.0),
        row(0.1, 0.885, 2.0),  # a dip does not bar what lies behind it
        row(0.2, 0.89, 3.0),
        row(0.4, 0.87, 4.0),
        row(0.3, 0.9, 9.0, unmask="factor"),
    ]

    def gamma(max_loss: float) -> float | None:
        best = recommend(rows, max_loss)
        return None if best is None else float(best["gamma"])

    assert gamma(0.0) == 0.0
    assert gamma(0.01) == 0.2  # 0.9 - 0.89 is not quite 0.01 in binary
    assert gamma(0.03) == 0.4
    assert gamma(1.0) == 0.4
    rows[1] = row(0.0, 0.88, 1.0)
    assert gamma(0.005) is None
    assert recommend([NTP], 1.0) is None
    assert recommend([], 1.0) is None


def test_nothing_is_recommended_where_ntp_is_never_right() -> None:
    nothing = {**NTP, "quality": {"value": 0.0}}
    assert recommend([nothing, row(1.5, 0.0, 6.0, loss={"value": 0.0})], 0.01) is None


def test_grid() -> None:
    assert [p.value for p in grid([16], ["entropy_bounded"], GAMMAS)] == [*GAMMAS]
    points = grid([4, 8], RULES, [0.5])
    assert {p.block_size for p in points} == {4, 8}
    settings = [p.setting() for p in points]
    assert len({s.name for s in settings}) == len(settings)
    assert settings[0].options == {
        "decoder": "sbd",
        "block_size": 4,
        "unmask": "entropy_bounded",
        "gamma": 0.5,
    }
    whole = [p.value for p in points if (p.block_size, p.unmask) == (4, "top_n")]
    assert whole == [1, 2, 3, 4]


# Runs


def test_tasks(
    engine: Engine, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--gammas", "0,0.1,inf", "--unmask", "all", "--block-sizes", "4,8", "--max-tokens", 12]
    code, printed, err = sweep(capsys, "--tasks", tasks, *flags, "--json", "--out", out)
    assert code == 0
    report = json.loads(printed)
    assert report["quality"] == "right answers"
    assert json.loads((out / "sweep.json").read_text()) == report
    ntp, *rows = report["results"]
    assert ntp["decoder"] == "ntp"
    assert ntp["quality"]["value"] == ntp["identical"]["value"] == 1
    assert len(rows) == 2 * (3 + 7 + 7) + 4 + 7
    answers = [json.loads(line)["answer"] for line in tasks.read_text().splitlines()]
    names = ("decoder", "block_size", "unmask", *(rule.option for rule in RULES.values()))
    for each in rows[::5]:
        options = {name: each[name] for name in names if name in each}
        if options.get("gamma") == "inf":
            options["gamma"] = float("inf")
        done = [engine.generate(p, max_tokens=12, **options) for p in PROMPTS]
        hits = [c.text.strip() == a.strip() for c, a in zip(done, answers, strict=True)]
        assert each["quality"]["value"] == sum(hits) / 4
        tokens, nfe = sum(len(c.tokens) for c in done), sum(c.stats.nfe for c in done)
        assert each["tokens_per_forward"]["value"] == pytest.approx(tokens / nfe)
    bounded = [r for r in rows if r["unmask"] == "entropy_bounded"]
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
    flags = ["--gammas", "0,inf", "--block-sizes", 8, "--max-tokens", 20]
    code, out, err = sweep(capsys, "--prompts", prompts, *flags, "--json")
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
    for each in rows:
        gamma = float(each["gamma"])
        done = [
            engine.generate(p, max_tokens=20, decoder="sbd", block_size=8, gamma=gamma)
            for p in PROMPTS
        ]
        agreed = sum(agreement(engine, p, c) for p, c in zip(PROMPTS, done, strict=True))
        assert each["quality"]["value"] == agreed / sum(len(c.tokens) for c in done)
        same = sum(c.text == r.text for c, r in zip(done, reference, strict=True))
        assert each["identical"]["value"] == same / 4
        assert each["loss"]["value"] == pytest.approx(1 - each["quality"]["value"])
    assert rows[1]["quality"]["value"] < 1  # else this showed little


def test_the_recommended_command_runs(
    engine: Engine, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gammas", "0.25", "--block-sizes", 5, "--max-loss", 100, "--max-tokens", 9]
    code, out, _ = sweep(capsys, "--prompts", prompts, *flags)
    assert code == 0
    assert "recommended: gamma 0.25 in blocks of 5: " in out
    lines = dict(line.strip().split(":", 1) for line in out.splitlines()[-2:])
    command = shlex.split(lines["now"])
    assert command[:2] == ["sbd-engine", "run"]
    assert command[-2:] == ["-p", "..."]
    code = main.run([*command[1:-1], PROMPTS[0], "--max-tokens", "9", "--json"])
    expected = engine.generate(PROMPTS[0], max_tokens=9, decoder="sbd", block_size=5, gamma=0.25)
    done = json.loads(capsys.readouterr().out)
    assert (code, done["tokens"]) == (0, expected.tokens)
    assert lines["in the file"].split("DIR -o model.bin ")[1] == (
        "--set sbd.gamma=0.25 --set sbd.block_size=5 --set sbd.unmask=entropy_bounded"
    )


def test_a_loss_that_no_gamma_keeps_to(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gammas", "inf", "--block-sizes", 16, "--max-loss", 0, "--max-tokens", 12]
    code, out, _ = sweep(capsys, "--tasks", tasks, *flags)
    assert code == 0
    assert "no gamma here loses at most 0 points: the least is " in " ".join(out.split())


def test_an_interrupted_sweep_goes_on(
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--gammas", "0.1,1", "--block-sizes", 16, "--batch", 2, "--max-tokens", 8, "--json"]
    call = ["--prompts", prompts, *flags]
    whole = json.loads(sweep(capsys, *call)[1])
    calls: list[int] = []
    generate_batch = Engine.generate_batch

    def counted(self: Engine, prompts: Any) -> list[Completion]:
        calls.append(len(prompts))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return generate_batch(self, prompts)

    monkeypatch.setattr(Engine, "generate_batch", counted)
    out = tmp_path / "out"
    code, printed, err = sweep(capsys, *call, "--out", out)
    assert code == 130
    partial = json.loads(printed)
    assert [each["questions"] for each in partial["results"]] == [2, 2, 2]
    assert "interrupted after 2 of 4 questions" in err
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]

    code, printed, _ = sweep(capsys, *call, "--out", out)
    assert code == 0
    assert calls == [2] * 7  # six batches in all, one of them tried twice
    for before, after in zip(whole["results"], json.loads(printed)["results"], strict=True):
        for key in ("quality", "identical", "loss", "tokens_per_forward"):
            assert before[key] == after[key]
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
        capsys, "--prompts", prompts, "--gammas", "0", "--max-tokens", 2, "--out", out
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
        (["--unmask", "factor,bold"], "unknown unmask 'bold': expected one of entropy_bounded, "),
        (["--block-sizes", "8,0"], "expected --block-sizes as integers >= 1 with commas"),
        (["--block-sizes", "8;16"], "'8;16'"),
        (["--block-sizes", 10**6], "block_size 1000000"),
        (["--max-loss", -1], "--max-loss from 0 to 100 points, got -1"),
        (["--max-loss", "nan"], "--max-loss"),
        (["--batch", 0], "--batch >= 1, got 0"),
        (["--limit", 0], "--limit >= 1, got 0"),
        (["--max-tokens", 0], "max_tokens >= 1, got 0"),
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


def test_the_recommended_file_keeps_its_other_decoders(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path)
    settings = ["decoders=nemotron,nemotron_spec,sbd,ntp"]
    convert(tmp_path / "checkpoint", model, type="f32", settings=settings, block_size=4)
    flags = ["--gammas", "0.1", "--max-loss", 100, "--max-tokens", 4, "--json"]
    recommended = json.loads(sweep(capsys, model, "--prompts", prompts, *flags)[1])["recommended"]
    assert "--decoder sbd" in recommended["command"]
    assert recommended["in_the_file"].endswith(" --set sbd.decoders=sbd,nemotron,nemotron_spec,ntp")


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
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert complaint in err
