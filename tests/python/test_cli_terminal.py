"""The command on a terminal, interrupted, and with streams that are closed or full."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.command import COMMAND, PROMPT, on_a_terminal, run, run_here
from python.tiny_model import MASK, write_tiny_model

from sbd_engine import Engine, Stream
from sbd_engine.convert import convert


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that generates for minutes."""
    model = write_tiny_model(tmp_path_factory.mktemp("endless"), n_ctx=200_000)
    flags = ["--max-tokens", "190000", "--ignore-eos", "--decoder", "ntp"]
    return [str(COMMAND), "run", str(model), "-p", PROMPT, *flags]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A test run in the background may have been started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
class TestInterrupt:
    def test_what_was_committed_then_130(self, endless: list[str]) -> None:
        process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert (begun + output).endswith(b"\n")
        assert len(begun + output) > 20
        tokens = int(re.findall(r"(\d+) tokens, ", errors.decode())[0])
        assert 10 <= tokens < 190_000
        assert b"Traceback" not in errors

    def test_json(
        self,
        endless: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        begin = Engine.stream

        def stream(self: Engine, *arguments: Any, **options: Any) -> Stream:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            return begin(self, *arguments, **options)

        monkeypatch.setattr(Engine, "stream", stream)
        done = run_here(capsys, *endless[1:], "--json")
        assert done.returncode == 130
        values = json.loads(done.stdout)
        assert values["finish_reason"] == "cancelled"
        assert values["tokens"]
        assert done.stderr == b""


def visible_end(text: str) -> str:
    return "".join(c for c in text.splitlines()[-1] if c.isprintable())


class TestShowBlocks:
    def test_on_a_terminal(self, engine: Engine, model: Path) -> None:
        flags = ("-p", PROMPT, "--max-tokens", 40, "--show-blocks")
        screen = on_a_terminal("run", model, *flags)
        assert "\x1b" not in screen  # the model's text has some
        assert "\u2591" * 7 in screen  # masks of the first block
        assert MASK not in screen
        assert visible_end(engine.generate(PROMPT, max_tokens=40).text) in screen

    @pytest.mark.parametrize(
        ("settings", "masks"),
        [
            # As Dream's: the text is one block, of which each forward decides a token. Written
            # lines have the masks drawn again.
            (
                ["decoders=dream", "prompt_attention=full", "commit_attention=none"],
                range(sum(range(24)), 2 * sum(range(24))),
            ),
            (["dmtd.layers=0,2,1"], range(1)),
        ],
    )
    def test_files_without_blocks(self, settings: list[str], masks: range, tmp_path: Path) -> None:
        model = write_tiny_model(tmp_path)
        rule = ["unmask=top_n", "top_n=1"]
        convert(tmp_path / "checkpoint", model, type="f32", settings=[*settings, *rule])
        with Engine(model) as engine:
            text = engine.generate(PROMPT, max_tokens=24, ignore_eos=True).text
        flags = ("-p", PROMPT, "--max-tokens", 24, "--ignore-eos", "--show-blocks")
        screen = on_a_terminal("run", model, *flags)
        assert visible_end(text) in screen
        assert screen.count("\u2591") in masks

    def test_the_block_stays_in_sight_of_a_small_pane(self, model: Path) -> None:
        """However long the line before it is."""
        call = ("run", model, "-p", PROMPT, "--max-tokens", 150, "--ignore-eos", "--show-blocks")
        wide = on_a_terminal(*call).count("\u2591")
        assert wide > 100
        assert on_a_terminal(*call, columns=40, lines=5).count("\u2591") == wide

    def test_blocks_that_stay(self, engine: Engine, model: Path) -> None:
        expected = engine.generate(PROMPT, max_tokens=24, ignore_eos=True)
        call = ("run", model, "-p", PROMPT, "--max-tokens", 24, "--ignore-eos", "--keep-blocks")
        screen = on_a_terminal(*call)
        numbers = re.findall(r"^ +(\d+) ", screen, re.M)
        assert numbers == [str(n) for n in range(1, expected.stats.nfe + 1)]
        assert visible_end(expected.text) in screen

    @pytest.mark.parametrize("flag", ["--show-blocks", "--keep-blocks"])
    def test_a_delay_for_each_forward(self, flag: str, model: Path) -> None:
        call = ("run", model, "-p", PROMPT, "-n", 4, "--ignore-eos", "--decoder", "ntp", flag)
        started = time.perf_counter()
        on_a_terminal(*call)
        at_once = time.perf_counter() - started
        on_a_terminal(*call, "--delay", 0.2)
        assert time.perf_counter() - started - at_once > 4 * 0.2

    def test_elsewhere_it_is_plain_text(self, engine: Engine, model: Path) -> None:
        done = run("run", model, "-p", PROMPT, "--max-tokens", 30, "--show-blocks")
        assert done.stdout.decode() == engine.generate(PROMPT, max_tokens=30).text + "\n"
        assert "note: --show-blocks needs a terminal" in done.stderr.decode()


@pytest.mark.parametrize("columns", [40, 80])
def test_no_number_is_lost_where_it_is_narrow(
    columns: int, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")

    def words(*arguments: object) -> list[str]:
        done = run_here(capsys, *arguments)
        assert (done.returncode, "…" in done.stdout.decode()) == (0, False)
        return done.stdout.decode().split()

    bench = words("bench", model, "--rows", "1,4", "--context", 16, "--repeats", 1)
    table = bench[bench.index("context") : bench.index("this")]
    assert len(table) == 11 + 2 * 7  # a heading of 11 words, 7 numbers a row
    listing = words("inspect", model, "--tensors")
    embedding = listing.index("token_embd.weight")
    with Engine(model) as engine:
        vocab, hidden = engine.model_config["vocab_size"], engine.model_config["hidden_size"]
    shape = ["f32", str(vocab), "x", str(hidden), f"{4 * vocab * hidden:,}"]
    assert listing[embedding + 1 : embedding + 6] == shape


class TestStreamsThatCannotBeWritten:
    """What a shell makes of `>&-`, `2>&-`, `<&-`, `>/dev/full` and `| head -1`."""

    @staticmethod
    def shell(line: str, model: Path) -> tuple[int, str, str]:
        done = subprocess.run(
            ["bash", "-c", line],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"RUN": f"{COMMAND} run {model} -p x -n 4 --ignore-eos"},
        )
        return done.returncode, done.stdout, done.stderr

    def test_closed_output(self, model: Path) -> None:
        said = "error: standard output cannot be written: Bad file descriptor\n"
        assert self.shell("$RUN >&-", model) == (2, "", said)
        assert self.shell("$RUN >&- 2>&-", model) == (2, "", "")

    def test_closed_errors(self, model: Path) -> None:
        code, output, errors = self.shell("$RUN 2>&-", model)
        assert (code, errors) == (0, "")
        assert output == self.shell("$RUN", model)[1]

    def test_closed_input(self, model: Path) -> None:
        code, output, errors = self.shell(f"{COMMAND} run {model} <&-", model)
        assert (code, output, errors.count("\n")) == (2, "", 1)
        assert "an empty one" in errors

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_a_full_disk(self, unbuffered: str, model: Path) -> None:
        said = "error: standard output cannot be written: No space left on device\n"
        environment = f"PYTHONUNBUFFERED={unbuffered}"
        for command in ("$RUN", f"{COMMAND} inspect {model}"):
            assert self.shell(f"{environment} {command} >/dev/full", model) == (2, "", said)

    @pytest.mark.parametrize(
        "command",
        [
            "$RUN",
            "$RUN --json",
            "{command} inspect {model} --tensors",
            "{command} run --help",
            "{command} convert --help",
        ],
    )
    def test_a_reader_that_leaves(self, command: str, model: Path) -> None:
        line = command.format(command=COMMAND, model=model)
        script = f"set -o pipefail; {line} 2>&3 | true"
        code, _, errors = self.shell(f"exec 3>&2; {script}", model)
        assert code == 0
        assert "error" not in errors
        assert "Traceback" not in errors
