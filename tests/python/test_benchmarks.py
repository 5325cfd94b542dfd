"""What decides the published tables: replayed acceptance, the tables' text, fair turns, and that an
engine which fails takes nothing else along. No peer is needed."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from python.tiny_model import write_tiny_model

from sbd_engine import Engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last, so that an installed package comes first

import cpu_peers  # noqa: E402
import dmtd  # noqa: E402
import drafts  # noqa: E402
import end_to_end  # noqa: E402
import lossless  # noqa: E402
import serving  # noqa: E402
from lineup import OURS, Entry  # noqa: E402
from page import write_docs  # noqa: E402
from peers.process import PeerError  # noqa: E402
from replay import Phase, phases, seconds_of_phase, tokens_per_forward  # noqa: E402
from report import docs_section, tables  # noqa: E402

MACHINE = {
    "read_gb_s": 51.25,
    "int8_gop_s": 2103.4,
    "bf16_gflop_s": 977.0,
    "f16_gflop_s": 529.0,
    "f32_gflop_s": 529.0,
}


# Replayed acceptance


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("reduction", [1.0, 2.2, 3.0, 3.4, 3.9])
def test_phases_come_as_near_as_whole_blocks_can(block_size: int, reduction: float) -> None:
    blocks = 192 // block_size
    plan = phases(block_size, blocks, reduction)
    assert sum(phase.blocks for phase in plan) == blocks
    for phase in plan:  # top_n at a time, until the block is revealed
        assert phase.forwards == len(range(0, block_size, phase.top_n))
    forwards = sum(phase.blocks * phase.forwards for phase in plan)
    assert tokens_per_forward(block_size, plan) == pytest.approx(192 / forwards)
    # Moving one block to the neighbouring top_n, up or down, comes no nearer.
    n = min(phase.top_n for phase in plan)
    step = max(
        abs(len(range(0, block_size, n)) - len(range(0, block_size, other)))
        for other in (n + 1, max(n - 1, 1))
    )
    assert abs(forwards - 192 / reduction) <= step / 2


def test_phases_of_a_known_average() -> None:
    # 64 forwards for 12 blocks of 16: four of them in 4 each, eight in 6 each.
    assert phases(16, 12, 3.0) == [Phase(4, 4, 4), Phase(8, 3, 6)]
    assert phases(8, 24, 1.0) == [Phase(24, 1, 8)]
    assert tokens_per_forward(16, [Phase(1, 16, 1), Phase(1, 1, 16)]) == pytest.approx(32 / 17)


def test_seconds_of_phase_leaves_the_first_block_out() -> None:
    generated = {"decided": [4, 4, 4, 4, 4, 4], "seconds": [0, 1, 3, 6, 10, 15]}
    assert seconds_of_phase(generated, 8, Phase(2, 4, 2)) == 14


@pytest.mark.parametrize(
    ("decided", "got"), [([4, 4, 4, 4], "got 4 deciding 8"), ([3, 4, 5, 4, 4, 4], "deciding 7")]
)
def test_seconds_of_phase_refuses_another_pattern(decided: list[int], got: str) -> None:
    generated = {"decided": decided, "seconds": list(range(len(decided)))}
    with pytest.raises(ValueError, match=rf"expected 6 forwards, the first 2 deciding 8 .*{got}"):
        seconds_of_phase(generated, 8, Phase(2, 4, 2))


# The tables


def result(engine: str, ms: tuple[float, float], error: float | None) -> dict[str, Any]:
    forwards = [
        {"context": 256, "rows": rows, "ms": each} for rows, each in zip((1, 8), ms, strict=True)
    ]
    return {
        "engine": engine,
        "weights": "q8_0",
        "class": "8 bits",
        "error": error,
        "forwards": forwards,
    }


REPORT = {
    "shape": "tiny",
    "threads": 2,
    "rounds": 5,
    "machine": MACHINE,
    "about": {OURS: "sbd-engine 0", "llama.cpp": "llama 1"},
    "missing": {"PyTorch int8": "No module named 'torch'"},
    "floors": [
        {"type": "q8_0", "rows": 1, "context": 256, "ms": 10.0},
        {"type": "q8_0", "rows": 8, "context": 256, "ms": 10.5},
    ],
    "results": [result(OURS, (11.04, 12.06), 0.0104), result("llama.cpp", (13.5, 31.25), None)],
}


def test_a_class_without_results_has_no_table() -> None:
    assert [table.title for table in tables(REPORT)] == [
        "8 bits, 256 positions in the KV cache, ms per forward"
    ]


def test_docs_section() -> None:
    assert docs_section(REPORT) == (
        "tiny, random weights, medians of 5 rounds. 2 threads; measured meanwhile: 51.2 GB/s read, "
        "2103 GOP/s int8, 977 GFLOP/s bf16 and 529 GFLOP/s float32. "
        "Versions: sbd-engine 0; llama 1.\n\n"
        "![Milliseconds per forward against rows per forward](performance.png)\n\n"
        "**8 bits, 256 positions in the KV cache, ms per forward**\n\n"
        "| rows per forward | error | 1 | 8 |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| **sbd-engine q8_0** | **0.010** | **11.0** | **12.1** |\n"
        "| llama.cpp q8_0 |  | 13.5 | 31.2 |\n"
        "| floor q8_0 |  | 10.0 | 10.5 |\n\n"
        "Not measured: PyTorch int8: No module named 'torch'."
    )


def test_write_docs_replaces_its_own_section_only(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text("head\n<!-- a -->\nold\n<!-- /a -->\ntail <!-- b --> <!-- /b -->\n")
    write_docs(path, "a", "new")
    assert path.read_text() == (
        "head\n<!-- a -->\n\nnew\n\n<!-- /a -->\ntail <!-- b --> <!-- /b -->\n"
    )
    with pytest.raises(SystemExit, match="expected the comments <!-- c --> and <!-- /c -->"):
        write_docs(path, "c", "new")


# Others beside one


def test_waiting_and_what_is_shared(tmp_path: Path) -> None:
    with Engine(write_tiny_model(tmp_path, n_ctx=4096)) as engine:
        told = serving.one_round(engine._core, 1)
        assert len(told["alone"]) == serving.ALONE
        assert len(told["beside"]) > 8  # a forward has 512 rows at most, and 7200 are to be read
        assert told["most_forwards"] == 1
        assert engine._core.n_sequences == 0
        shared = serving.measure_system_prompt(engine)
        assert shared["computed"] == 1000 + 16 * 20
        assert shared["prompt_tokens"] == 16 * 1020
        chat = serving.measure_chat(engine, 1)
        assert chat["cached_tokens"] >= chat["prompt_tokens"][0] - 1
        waits = {"alone_ms": 1, "alone_p95_ms": 2, "beside_ms": 3, "beside_p95_ms": 4}
        report = {"model": "tiny", "device": "cpu", "threads": 2, "rounds": 1, "chat": chat}
        report |= {"waits": {**waits, "most_forwards": 1}, "system_prompt": shared}
        assert f"| of these computed | {1000 + 16 * 20} |  |" in serving.docs_section(report)


# Lossless decoding beside next-token decoding


def test_what_drafting_gains_and_what_is_kept() -> None:
    prompts = lossless.shuffled_prompts()
    with Engine() as engine:
        speed = lossless.measure_speed(engine, prompts, batch=2, rounds=2, blocks=[8])
        kept = lossless.measure_kept(engine, prompts[:4], temperature=0.7)
    assert list(speed["gain"]) == ["ntp again", "chosen", "8"]
    assert min(speed["gain"].values()) > 0 and min(speed["error"].values()) >= 0
    assert 0 < kept["guesses_kept"] <= 1 < kept["tokens_per_forward"]
    speeds = [{"model": "demo", "batch": 2, **speed}]
    report = {"device": "cpu", "threads": 2, "speeds": speeds, "kept": [kept]}
    section = lossless.docs_section(report)
    assert "| model | batch | ntp tok/s | ntp again | chosen | blocks of 8 | tok/forward" in section
    assert f"| 0.7 | {kept['guesses_kept']:.1%} |" in section


# A run, with processes that only write down who was asked what


class Recorder:
    """Stands for peers.process.Process: module "peers.NAME" fails in the methods named in
    options["fails"]."""

    calls: list[tuple[str, str]]
    open: list[str]

    def __init__(self, module: str, options: dict[str, Any], log: Path) -> None:
        self.name, self._fails = module.removeprefix("peers."), options.get("fails", ())
        self.about = self.name
        self.open.append(self.name)

    def call(self, method: str, **arguments: Any) -> Any:
        if method in self._fails:
            raise PeerError(f"{self.name} failed")
        self.calls.append((self.name, method))
        if method == "machine":
            return MACHINE
        if method == "logits":
            np.save(arguments["to"], np.full(4, 2.0 if self.name == "pytorch" else 3.0))
        return [1.0] * arguments.get("repeats", 0)

    def close(self) -> None:
        self.open.remove(self.name)


def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lineup: list[Entry], rounds: int = 1
) -> dict[str, Any]:
    """The report of a run over `lineup`; every process has been closed."""
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    monkeypatch.setattr(Recorder, "open", [], raising=False)
    monkeypatch.setattr(cpu_peers, "Process", Recorder)
    monkeypatch.setattr(cpu_peers, "checkpoint", lambda *_: tmp_path)
    monkeypatch.setattr(cpu_peers.Run, "_entries", lambda *_: lineup)
    run = cpu_peers.Run(
        Namespace(
            shape="tiny", threads=2, rounds=rounds, rows=[1, 8], context=[256], work_dir=tmp_path
        )
    )
    run.measure(("8 bits",))
    assert Recorder.open == []
    return run.report()


def entry(engine: str, **options: Any) -> Entry:
    return Entry(engine, "q8_0", "8 bits", f"peers.{engine}", options)


def test_a_turn_measures_the_machine_once_and_each_round_begins_with_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lineup = [entry(OURS), entry("a"), entry("b")]
    report = measured(monkeypatch, tmp_path, lineup, rounds=3)
    asked = [call for call in Recorder.calls if call[1] != "logits"]
    turns = [asked[i : i + 4] for i in range(0, len(asked), 4)]
    assert [turn[0] for turn in turns] == [(OURS, "machine")] * 6
    orders = [[name for name, _ in turn[1:]] for turn in turns]
    each = [["a", "b", OURS], ["b", OURS, "a"], [OURS, "a", "b"]]
    assert orders == [order for order in each for _ in (1, 8)]
    assert len(report["machine_samples"]) == 6
    assert [r["error"] for r in report["results"]] == [0.5] * 3


def test_a_failed_reference_costs_the_errors_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class NoReference(Recorder):
        def __init__(self, module: str, options: dict[str, Any], log: Path) -> None:
            fails = ("logits",) if module == "peers.pytorch" else ()
            super().__init__(module, {**options, "fails": fails}, log)

    monkeypatch.setattr(sys.modules[__name__], "Recorder", NoReference)
    report = measured(monkeypatch, tmp_path, [entry(OURS), entry("a")])
    assert report["missing"] == {"the column of errors": "pytorch failed"}
    assert [(r["engine"], r["error"]) for r in report["results"]] == [(OURS, None), ("a", None)]
    assert all(len(r["forwards"]) == 2 for r in report["results"])


def test_a_failed_engine_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lineup = [entry(OURS), entry("a", fails=("time",)), entry("b")]
    report = measured(monkeypatch, tmp_path, lineup)
    assert report["missing"] == {"a q8_0": "a failed"}
    assert [r["engine"] for r in report["results"]] == [OURS, "b"]


# Command lines


@pytest.mark.parametrize(
    ("script", "line", "expected"),
    [
        (cpu_peers, "--rows 0", "--rows: expected an integer >= 1, got '0'"),
        (cpu_peers, "--context 256,x", "--context: expected an integer >= 1, got 'x'"),
        (cpu_peers, "--types q9_0", "--types: expected some of f16, bf16, q8_0, q4_0, q6_k, "),
        (cpu_peers, "--peers me", "--peers: expected some of llama.cpp, OpenVINO, onnxruntime, "),
        (cpu_peers, "--shape cube", "--shape: invalid choice: 'cube'"),
        (cpu_peers, f"--work-dir {__file__}", "test_benchmarks.py: File exists"),
        (cpu_peers, "--row 1", "unrecognized arguments: --row 1"),
        (end_to_end, "--tokens 100", "--tokens: expected a multiple of every block size"),
    ],
)
def test_argument_errors(
    script: ModuleType,
    line: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--work-dir", str(tmp_path), *line.split()])
    with pytest.raises(SystemExit) as ended:
        script.arguments()
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert expected in output.err


def test_the_script_ends_with_exit_code_2_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "cpu_peers.py"), "--rounds", "none"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: argument --rounds: expected an integer >= 1, got 'none'\n"


# Direct Multi-Token Decoding


def test_weights_read_by_hand() -> None:
    # A layer has 4 weights of attention and 6 of its MLP, the head 40: a token of NTP reads 400.
    config = {
        "hidden_size": 1,
        "head_dim": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 2,
        "vocab_size": 40,
    }
    assert dmtd.weights_read(config, None) == 1
    assert dmtd.weights_read(config, 1) == 1
    # Four tokens run 36 + 3 * 8 layers: 15 each.
    assert dmtd.weights_read(config, 4) == pytest.approx((15 * 10 + 40) / 400)


def test_dmtd_beside_ntp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 256,
    }
    monkeypatch.setattr(dmtd, "QWEN3_4B", tiny)
    monkeypatch.setattr(dmtd, "LAYERS", (0, 2, 1))
    flags = ["--horizons", "2,3", "--tokens", "12", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["dmtd.py", *flags, "--work-dir", str(tmp_path)])
    dmtd.main()
    output = capsys.readouterr()
    lines = (output.out + output.err).splitlines()
    rows = [line for line in lines if line.strip().startswith(("ntp", "dmtd, horizon"))]
    assert len(rows) == 3
    assert rows[0].split()[-2:] == ["1.00", "1.00"]
    assert [row.split()[2] for row in rows[1:]] == ["2", "3"]


# Draft adapters


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([*range(20), *[1, 2, 3, 4] * 3], True),
        ([*range(20), *[1, 2, 3, 4] * 3, 5], False),  # it has come out of it
        ([*range(20), *[7] * 12], True),
        ([*range(20), *[7] * 11], False),  # as a row of dots may be
        ([*range(20), *[1, 2, 3, 4] * 2], False),
        ([], False),
    ],
)
def test_texts_that_come_to_loop(tokens: list[int], loops: bool) -> None:
    assert drafts.comes_to_loop(tokens) is loops


def test_tables_of_drafts() -> None:
    def group(family: str, loops: int, seconds: float, forwards: int) -> dict[str, Any]:
        ways = {
            name: {"tokens": 100, "forwards": 100, "seconds": 2.0}
            for name in (drafts.NTP, drafts.GREEDY, drafts.LOOKUP)
        }
        ways[drafts.DRAFTS] = {"tokens": 100, "forwards": forwards, "seconds": seconds}
        return {"family": family, "loops": loops, "ways": ways}

    groups = [group("letter", 0, 1.0, 50), group("facts", 1, 4.0, 100)]
    part = {"temperature": 0.0, "batch": 1, "groups": groups}
    sampled = {"temperature": 0.7, "batch": 8, "groups": [group("letter", 0, 1.0, 50)]}
    del sampled["groups"][0]["ways"][drafts.LOOKUP]  # as in batches
    point = {"tokens": 641105, "prefix": 1.7, "prefix_fused": 0.81, "acceptance": [1, 0.87]}
    report = {
        "threads": 2,
        "draft": "adapter.gguf",
        "training": [point],
        "models": [{"model": "a.gguf", "about": ["x"], "parts": [part, sampled]}],
    }
    speed, kinds = drafts.tables(report)
    assert speed.lines[0][:5] == ["a.gguf", "0", "1", "50", "40"]
    assert speed.lines[0][5].startswith("0.80 (0.50 to 2.00")
    assert speed.lines[1][5:7] == ["2.00 (2.00 to 2.00)"] * 2
    assert speed.lines[1][7:] == ["1.00 (1.00 to 1.00)", "2.00 (2.00 to 2.00)", ""]
    assert [line[0] for line in kinds.lines] == [
        "facts",
        "letter",
        "texts that loop",
        "other texts",
    ]
    assert kinds.lines[1][2] == "2.00 (2.00 to 2.00)" and kinds.lines[2][3].startswith("0.50")
    assert drafts.training_table(report).lines == [["0.64 M", "87", "1.70", "0.81"]]
    assert "| letter | 1 |" in drafts.docs_section(report)
