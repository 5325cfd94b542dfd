"""The installed `sbd-engine` command: its output, its errors and how it ends."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from python.tiny_model import EOS, MASK, byte_tokenizer, write_tiny_model

from sbd_engine import Engine
from sbd_engine.cli import main, options
from sbd_engine.convert import convert
from sbd_engine.convert.values import Value
from sbd_engine.convert.writer import OutputTensor, write_gguf
from sbd_engine.errors import SbdValueError
from sbd_engine.parameters import Parameters

COMMAND = Path(sys.executable).parent / "sbd-engine"
PROMPT = "Hello the world"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No mask token, no chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("plain"), sbd=False, chat=False)


CLEAR = "\x1b[2J"  # a terminal that is told so clears its screen


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No model: escape sequences wherever a file has text, each before a name to look for."""
    path = tmp_path_factory.mktemp("hostile") / "hostile.bin"
    metadata: dict[str, Value] = {
        "general.architecture": f"{CLEAR}architecture",
        "general.name": f"{CLEAR}title\nforged  line",
        f"sbd.{CLEAR}key": f"{CLEAR}value",
    }
    values = [np.ones(2, np.float32)]
    tensor = OutputTensor(f"{CLEAR}tensor", (2,), GGMLQuantizationType.F32, lambda: iter(values))
    write_gguf(path, metadata, [tensor])
    return path


def with_template(folder: Path, template: str) -> Path:
    """The tiny model with another chat template."""
    model = write_tiny_model(folder)
    path = model.parent / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    convert(model.parent / "checkpoint", model, type="f32")
    return model


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model) as engine:
        yield engine


def run(*arguments: object, stdin: bytes = b"", **environment: str) -> Any:
    """Exit code, standard output and standard error of one command, as `returncode` and so on."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The same without a process, which would take most of the time."""
    code = main.run(
        [a.decode(errors="surrogateescape") if isinstance(a, bytes) else str(a) for a in arguments]
    )
    captured = capsys.readouterr()
    return subprocess.CompletedProcess(
        arguments, code, captured.out.encode(), captured.err.encode()
    )


class TestRun:
    def test_text_on_stdout_and_figures_on_stderr(self, engine: Engine, model: Path) -> None:
        done = run("run", model, "-p", PROMPT, "--max-tokens", 30, "--ignore-eos")
        expected = engine.generate(PROMPT, max_tokens=30, ignore_eos=True)
        assert (done.returncode, done.stdout.decode()) == (0, expected.text + "\n")
        nfe = expected.stats.nfe
        assert f"30 tokens, {nfe} forwards (NFE), {30 / nfe:.2f} tokens per" in str(done.stderr)
        assert "tok/s" in str(done.stderr)
        assert b"\x1b[" not in done.stderr  # no colour where no terminal is

    def test_json_is_the_completion(self, engine: Engine, model: Path) -> None:
        done = run("run", model, "-p", PROMPT, "--max-tokens", 30, "--json")
        expected = engine.generate(PROMPT, max_tokens=30)
        values = json.loads(done.stdout)
        assert values["text"] == expected.text
        assert values["tokens"] == expected.tokens
        assert values["finish_reason"] == expected.finish_reason
        assert values["stats"]["nfe"] == expected.stats.nfe
        assert set(values["stats"]) == {
            "prompt_tokens",
            "nfe",
            "tokens_per_forward",
            "ttft_ms",
            "prefill_tok_s",
            "decode_tok_s",
            "accepted_length",
            "thinking_forwards",
        }
        assert done.stderr == b""

    def test_prompts_from_everywhere(self, model: Path, tmp_path: Path) -> None:
        flags = ["--max-tokens", 8, "--json", "--threads", 1, "--n-ctx", 100, "--kv-dtype", "f16"]
        file = tmp_path / "prompt.txt"
        file.write_text(PROMPT)
        outputs = [
            json.loads(done.stdout)["tokens"]
            for done in (
                run("run", model, "-p", PROMPT, *flags),
                run("run", model, "-f", file, *flags),
                run("run", model, "-p", "-", *flags, stdin=PROMPT.encode()),
                run("run", model, *flags, stdin=PROMPT.encode()),
            )
        ]
        assert outputs == [outputs[0]] * 4

    def test_chat_uses_the_template(self, engine: Engine, model: Path) -> None:
        done = run("run", model, "-p", "hi", "--chat", "--max-tokens", 8, "--json")
        tokenizer = engine.tokenizer
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        expected = engine.generate(tokenizer.encode(text, add_bos=False), max_tokens=8)
        assert json.loads(done.stdout)["tokens"] == expected.tokens

    def test_template_arguments(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        written = "{{ x }}|{{ y }}|{{ tools[0].name }}|{{ messages[0].content }}"
        model = with_template(tmp_path, written)
        arguments = ["x=false", "y=a=b", 'tools=[{"name": "t"}]']
        flags = [part for each in arguments for part in ("--template-arg", each)]
        call = ("run", model, "--max-tokens", 4, "--json", "-p")
        done = run_here(capsys, *call, "hi", "--chat", *flags)
        tokens = json.loads(done.stdout)["tokens"]
        with Engine(model) as engine:
            ids = engine.tokenizer.encode("False|a=b|t|hi", add_bos=False)
            assert engine.generate(ids, max_tokens=4).tokens == tokens

    def test_ntp_comes_with_a_note(self, plain_model: Path) -> None:
        done = run("run", plain_model, "-p", PROMPT, "--max-tokens", 4, "--ignore-eos")
        assert done.returncode == 0
        assert "note: " in done.stderr.decode()
        asked = run("run", plain_model, "-p", PROMPT, "--max-tokens", 4, "--decoder", "ntp")
        assert "note: " not in asked.stderr.decode()

    def test_stdout_that_closes_early_is_no_error(self, model: Path) -> None:
        command = [COMMAND, "run", model, "-p", PROMPT, "--max-tokens", "400", "--ignore-eos"]
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
        os.close(writing)
        assert b"error" not in done.stderr
        assert b"Traceback" not in done.stderr

    def test_a_terminal_without_utf8(self, model: Path) -> None:
        done = run("run", model, "-p", PROMPT, "--max-tokens", 40, PYTHONIOENCODING="ascii")
        assert done.returncode == 0
        assert b"?" in done.stdout


@pytest.mark.parametrize("command", ["run", "eval"])
def test_every_option_reaches_the_engine(
    command: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, tasks = tmp_path / "draft.bin", tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "x", "answer": "y"}')
    engine_options = {
        "device": "cpu",
        "n_threads": 1,
        "n_ctx": 100,
        "kv_dtype": "f32",
        "draft_lora": adapter,
    }
    options: dict[str, Any] = {
        "max_tokens": 9,
        "decoder": "sbd_lossless",
        "block_size": 7,
        "unmask": "entropy_bounded",
        "gamma": 1.5,
        "proxy": "margin",
        "factor": 1.25,
        "confidence_threshold": 0.5,
        "top_n": 3,
        "steps": 5,
        "horizon": 2,
        "block_add_threshold": 0.25,
        "decoded_token_threshold": 0.75,
        "skip_threshold": 0.625,
        "temperature": 0.75,
        "top_p": 0.875,
        "top_k": 40,
        "seed": 11,
        "stop": ["never", "seen"],
    }
    taken = {f.name: f.default for f in fields(Parameters)} | {
        name: parameter.default for name, parameter in signature(Engine).parameters.items()
    }
    # sample_index tells samples of one call apart: a command makes one.
    elsewhere = {"path", "prompt", "ignore_eos", "sample_index"}
    assert {*options, *engine_options} == {*taken} - elsewhere
    assert all(value != taken[name] for name, value in (options | engine_options).items())

    made: dict[str, Any] = {}
    asked: list[dict[str, Any]] = []
    make, stream = Engine.__init__, Engine.stream

    def recorded_make(self: Engine, *arguments: Any, **named: Any) -> None:
        made.update(signature(make).bind(self, *arguments, **named).arguments)
        make(self, made["path"])

    def recorded_stream(self: Engine, prompt: Any, **named: Any) -> Any:
        if named["decoder"] == "ntp":  # what eval compares with
            return stream(self, prompt, **named)
        asked.append(named)
        raise SbdValueError("seen enough")

    monkeypatch.setattr(Engine, "__init__", recorded_make)
    monkeypatch.setattr(Engine, "stream", recorded_stream)
    line: list[Any] = ["-p", "x", "--ignore-eos"] if command == "run" else ["--tasks", tasks]
    for name, value in (engine_options | options).items():
        flag = "--threads" if name == "n_threads" else f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            line += [flag, each]
    done = run_here(capsys, command, model, *line)
    assert done.stderr == b"error: seen enough\n"
    assert asked == [options | ({"ignore_eos": True} if command == "run" else {})]
    assert {name: made[name] for name in engine_options} == engine_options


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

    def test_json(self, endless: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        done = run_here(capsys, *endless[1:], "--json")
        assert done.returncode == 130
        values = json.loads(done.stdout)
        assert values["finish_reason"] == "cancelled"
        assert values["tokens"]
        assert done.stderr == b""


def on_a_terminal(*arguments: object) -> str:
    """All that a command writes to its screen, without the escape sequences."""
    main, child = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=child,
        stdout=child,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "300"},
    )
    os.close(child)
    output = b""
    try:
        while data := os.read(main, 65536):
            output += data
    except OSError:  # how Linux says that the other end has closed
        pass
    os.close(main)
    assert process.wait(timeout=20) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())


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

    def test_elsewhere_it_is_plain_text(self, engine: Engine, model: Path) -> None:
        done = run("run", model, "-p", PROMPT, "--max-tokens", 30, "--show-blocks")
        assert done.stdout.decode() == engine.generate(PROMPT, max_tokens=30).text + "\n"
        assert "note: --show-blocks needs a terminal" in done.stderr.decode()


class TestInspect:
    def test_json(self, model: Path) -> None:
        done = run("inspect", model, "--json", "--tensors")
        values = json.loads(done.stdout)
        assert values["file"] == "tiny.bin"
        assert values["file_bytes"] == model.stat().st_size
        assert values["architecture"] == "qwen3"
        assert list(values["decoders"]) == ["sbd", "ntp", "sbd_lossless"]
        assert values["decoders"]["sbd"]["gamma"] == 0.35
        assert values["defaults"]["block_size"] == values["sbd"]["sbd.block_size"] == 16
        assert values["defaults"]["gamma"] == 0.35
        assert values["model_config"]["max_position_embeddings"] == 512
        assert values["model_config"]["mask_token_id"] == byte_tokenizer().token_to_id(MASK)
        assert values["model_config"]["eos_token_ids"] == [byte_tokenizer().token_to_id(EOS)]
        assert values["tokenizer"] == "tokenizer.json"
        assert values["chat_template"] is True
        assert values["problem"] is None
        assert len(values["tensors"]) == values["n_tensors"] > 10
        embedding = next(t for t in values["tensors"] if t["name"] == "token_embd.weight")
        assert embedding["type"] == "f32"
        assert embedding["shape"] == [272, values["model_config"]["hidden_size"]]
        assert embedding["bytes"] == 4 * 272 * values["model_config"]["hidden_size"]
        assert sum(t["bytes"] for t in values["tensors"]) == sum(values["bytes_by_type"].values())

    def test_json_has_no_infinity(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = write_tiny_model(tmp_path)
        convert(tmp_path / "checkpoint", model, type="f32", block_size=4, gamma=math.inf)
        done = run_here(capsys, "inspect", model, "--json")
        values = json.loads(done.stdout, parse_constant=pytest.fail)
        gammas = values["sbd"]["sbd.gamma"], values["defaults"]["gamma"]
        assert {*gammas, values["decoders"]["sbd"]["gamma"]} == {"inf"}

    def test_for_people(self, model: Path, plain_model: Path) -> None:
        text = run("inspect", model, "--tensors").stdout.decode()
        for part in ("tiny.bin", "qwen3", "sbd (block_size 16, unmask entropy_bounded"):
            assert part in text
        assert re.search(r"also +ntp\n", text)
        assert "token_embd.weight" in text
        assert "blk.0.attn_q_norm.weight" in text
        plain = run("inspect", plain_model).stdout.decode()
        assert re.search(r"decoder +ntp\n", plain)
        assert "token_embd.weight" not in plain

    def test_no_escape_sequence_of_the_file_reaches_a_terminal(self, hostile_model: Path) -> None:
        done = run("inspect", hostile_model, "--tensors")
        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode()
        assert "\x1b" not in text
        for part in ("[2Jarchitecture", "[2Jtitle forged", "sbd.[2Jkey", "[2Jvalue", "[2Jtensor"):
            assert part in text


class TestBench:
    def test_config(self, model: Path) -> None:
        config = model.parent / "checkpoint" / "config.json"
        done = run(
            *("bench", "--config", config, "--type", "f16", "--rows", "32,1,16"),
            *("--context", "8,20", "--repeats", 3, "--nfe-reduction", 4, "--threads", 1, "--json"),
        )
        values = json.loads(done.stdout)
        results = {(r["context"], r["rows"]): r for r in values["results"]}
        assert set(results) == {(c, r) for c in (8, 20) for r in (1, 16, 32)}
        for (context, _), result in results.items():
            one = results[context, 1]["ms_per_forward"]
            assert result["ms_per_forward"] > 0
            assert result["ratio_to_one_row"] == result["ms_per_forward"] / one
        implied = values["implied_speedup"]
        assert implied["nfe_reduction"] == 4
        assert [(r["context"], r["block_size"]) for r in implied["results"]] == [(8, 16), (20, 16)]
        for speedup in implied["results"]:
            time = {n: results[speedup["context"], n]["ms_per_forward"] for n in (1, 16, 32)}
            expected = 16 * time[1] / (time[32] + 3 * time[16])
            assert speedup["speedup"] == pytest.approx(expected)
        assert values["n_threads"] == 1
        machine = values["machine"]
        assert machine["read_gb_s"] > 0.1
        assert machine["int8_gop_s"] > 0.1
        assert machine["bf16_gflop_s"] > 0.1
        # Tied: the embedding is read as the head. 2 bytes a weight, 4 in norms, and the KV cache.
        shape = json.loads(config.read_text())
        heads, width = shape["num_attention_heads"], shape["head_dim"]
        kv, hidden = shape["num_key_value_heads"] * width, shape["hidden_size"]
        weights = 2 * hidden * heads * width + 2 * hidden * kv
        weights += 3 * hidden * shape["intermediate_size"]
        layers = shape["num_hidden_layers"]
        matrices = 272 * hidden + layers * weights
        total = 2 * matrices + 4 * hidden + 4 * layers * 2 * (hidden + width)
        assert values["weight_bytes"] == total
        for (context, rows), result in results.items():
            read = (total + context * layers * 2 * kv * 2) / machine["read_gb_s"]
            attention = rows * 4 * layers * (context + rows) * heads * width
            dots = max(machine["f32_gflop_s"], machine["bf16_gflop_s"])  # of an F16 cache
            multiply = rows * 2 * matrices / machine["f32_gflop_s"] + attention / dots
            assert result["floor_ms"] == pytest.approx(max(read, multiply) / 1e6)
            bandwidth = read * machine["read_gb_s"] / result["ms_per_forward"] / 1e6
            assert result["read_gb_s"] == pytest.approx(bandwidth)

    def test_batch(self, model: Path) -> None:
        """Each sequence reads its own cache, all of them read the weights once."""
        call = ("bench", model, "--rows", "1,4", "--context", 16, "--repeats", 1, "--json")
        caches = []
        for batch in (1, 3):
            report = json.loads(run(*call, "--batch", batch).stdout)
            assert report["batch"] == batch
            for result in report["results"]:
                n_bytes = result["read_gb_s"] * result["ms_per_forward"] * 1e6
                caches.append(n_bytes - report["weight_bytes"])
        assert caches[0] > 0
        assert caches == pytest.approx([caches[0], caches[0], 3 * caches[0], 3 * caches[0]])

    def test_model(self, model: Path) -> None:
        done = run("bench", model, "--rows", "1,2", "--context", "16", "--repeats", 1)
        assert done.returncode == 0
        said = done.stdout.decode()
        assert "GB/s" in said
        assert "best block size" not in said  # nothing to tell it from


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["-p", ""], "empty"),
            (["-p", b"\xff"], "UTF-8"),
            (["-p", "x" * 600], "512"),
            (["-p", "x", "-f", "y"], "got both"),
            (["-f", "missing.txt"], "missing.txt: no such file"),
            (["-f", "/"], "cannot be read"),
            (["-p", "x", "--block-size", 0], "block_size >= 1, got 0"),
            (["-p", "x", "--block-size", 513], "513"),
            (["-p", "x", "--gamma", -1], "gamma >= 0, got -1"),
            (["-p", "x", "--gamma", "nan"], "got nan"),
            (["-p", "x", "--gamma", "much"], "--gamma"),
            (["-p", "x", "--temperature", -1], "temperature"),
            (["-p", "x", "--top-p", 0], "top_p"),
            (["-p", "x", "--top-p", 1.01], "top_p"),
            (["-p", "x", "--top-k", -1], "top_k"),
            (["-p", "x", "--max-tokens", 0], "max_tokens >= 1, got 0"),
            (["-p", "x", "--threads", 0], "n_threads >= 1, got 0"),
            (["-p", "x", "--n-ctx", 0], "n_ctx >= 1, got 0"),
            (["-p", "x", "--n-ctx", 10**6], "n_ctx"),
            (["-p", "x", "--device", "gpu"], "expected auto, cpu, cuda or cuda:N"),
            (["-p", "x", "--decoder", "sdb"], "sdb"),
            (["-p", "x", "--unmask", "all"], "entropy_bounded"),
            (["-p", "x", "--kv-dtype", "f64"], "kv_dtype"),
            (["-p", "x", "--seed", -1], "seed"),
            (["-p", "x", "--stop", ""], "stop"),
            (["-p", "x", "--json", "--show-blocks"], "got both"),
            (["-p", "x", "--no-such-flag"], "--no-such-flag"),
            (["-p"], "requires an argument"),
        ],
    )
    def test_run(
        self, model: Path, flags: list[Any], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.check(run_here(capsys, "run", model, *flags), complaint)

    @pytest.mark.parametrize("command", [["run", "-p", "x"], ["inspect"], ["bench"]])
    def test_model_files(
        self, command: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = tmp_path / "bad.bin"
        verb, *flags = command
        self.check(run_here(capsys, verb, bad, *flags), "no such file")
        self.check(run_here(capsys, verb, tmp_path, *flags), "folder")
        whole = model.read_bytes()
        for content in (b"", b"no gguf at all" * 10, whole[: len(whole) // 2], whole[:-1]):
            bad.write_bytes(content)
            self.check(run_here(capsys, verb, bad, *flags), "bad.bin")

    def test_the_installed_command(self, model: Path) -> None:
        self.check(run("run", "missing.bin", "-p", "x"), "missing.bin: no such file")
        self.check(run("run", model, "-p", "x", "--gamma", "nan"), "gamma >= 0, got nan")
        self.check(run("walk"), "walk")

    def test_prompt_on_stdin(self, model: Path) -> None:
        self.check(run("run", model, stdin=b""), "empty")
        self.check(run("run", model, stdin=b"ab\xff"), "byte 0xff at offset 2")

    def test_no_gpu(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        call = ("run", model, "-p", "x", "--max-tokens", 1, "--device")
        if run_here(capsys, *call, "cuda").returncode == 0:
            return  # there is one
        for device in ("cuda", "cuda:1"):
            self.check(run_here(capsys, *call, device), "device cuda: ")
        assert run_here(capsys, *call, "auto").returncode == 0

    def test_what_a_model_lacks(
        self, plain_model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        call = ("run", plain_model, "-p", "x")
        self.check(run_here(capsys, *call, "--chat"), "no chat template")
        self.check(run_here(capsys, *call, "--decoder", "sbd"), "mask")

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--template-arg", "x=1"], "together with --chat"),
            (["--chat", "--template-arg", "x"], "--template-arg NAME=VALUE"),
            (["--chat", "--template-arg", "messages=[]"], "got 'messages=[]'"),
            (["--chat", "--template-arg", "chat_template=rag"], "expected one of default"),
            (["--chat", "--template-arg", "tools=1"], "expected tools as a list"),
        ],
    )
    def test_template_arguments(
        self, flags: list[str], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.check(run_here(capsys, "run", model, "-p", "x", *flags), complaint)

    @pytest.mark.parametrize(
        ("template", "complaint"),
        [
            ("{{ 'a' * 10**10 }}", "needs more memory than its 128 MiB"),
            (f"{{{{ raise_exception('{CLEAR}no') }}}}", "refused the conversation: [2Jno"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed: RecursionError"),
            ("{{ 1 // 0 }}", "failed: ZeroDivisionError"),
            ("{% if %}", "failed: Expected an expression"),
        ],
    )
    def test_chat_templates(
        self, template: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = with_template(tmp_path, template)
        self.check(run_here(capsys, "run", model, "-p", "x", "--chat"), complaint)

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--rows", "0"], "--rows"),
            (["--rows", "1,x"], "'1,x'"),
            (["--context", "-1"], "--context"),
            (["--repeats", "0"], "--repeats >= 1, got 0"),
            (["--batch", "0"], "--batch >= 1, got 0"),
            (["--nfe-reduction", "nan"], "--nfe-reduction"),
            (["--context", "600"], "600"),
            (["--config", "config.json"], "got both"),
        ],
    )
    def test_bench(
        self, model: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.check(run_here(capsys, "bench", model, *flags), complaint)

    def test_bench_config(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = tmp_path / "config.json"
        self.check(run_here(capsys, "bench", "--config", config), "no such file")
        for content, complaint in (("{", "JSON"), ("[]", "no JSON object"), ("{}", "model_type")):
            config.write_text(content)
            self.check(run_here(capsys, "bench", "--config", config), complaint)

    def test_debug_shows_where(self) -> None:
        done = run("run", "missing.bin", "-p", "x", "--debug")
        assert done.returncode != 0
        assert b"Traceback" in done.stderr

    @staticmethod
    def check(done: Any, complaint: str) -> None:
        output, errors = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == 2, errors
        assert errors.startswith("error: ")
        assert complaint in errors
        assert errors.count("\n") == 1
        assert "\x1b" not in errors
        assert output == ""


def test_a_note_is_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    options.note(f"a {CLEAR}name\nerror: none")
    assert capsys.readouterr().err == "note: a [2Jname error: none\n"


def test_help_and_version() -> None:
    assert run("--version").stdout.decode().startswith("sbd-engine ")
    for arguments in ([], ["--help"]):
        done = run(*arguments)
        assert done.returncode == 0
        for name in ("run", "inspect", "bench", "convert"):
            assert name in done.stdout.decode()
        assert done.stderr == b""
    assert "--gamma" in run("run", "--help").stdout.decode()
    assert "--mask-token" in run("convert", "--help").stdout.decode()
