"""`sbd-engine run`: prompts in, text and figures out."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from python.command import COMMAND, PROMPT, check_error, run, run_here
from python.tiny_model import with_template

from sbd_engine import Engine, SbdValueError, _core
from sbd_engine.parameters import Parameters


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
            "drafts",
            "forwards",
            "thinking_forwards",
            "cached_tokens",
        }
        assert (values["decoder"], values["seed"]) == ("sbd", None)
        in_force = {k: v for k, v in engine.resolve(max_tokens=30).items() if k != "decoder"}
        assert values["options"] == in_force
        assert "trace" not in values
        assert done.stderr == b""

    def test_json_with_a_trace(
        self, engine: Engine, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--json", "--trace", "--max-tokens", 20)
        values = json.loads(run_here(capsys, "run", model, "-p", PROMPT, *flags).stdout)
        chunks = [*engine.stream(PROMPT, max_tokens=20)]
        assert len(values["trace"]) == len(chunks) > 3
        for traced, chunk in zip(values["trace"], chunks, strict=True):
            assert (traced["text"], traced["tokens"]) == (chunk.text, chunk.tokens)
            for got, reveal in zip(traced["revealed"], chunk.revealed, strict=True):
                assert got.pop("text") == engine.tokenizer.piece(reveal.token)
                assert got == pytest.approx(reveal._asdict())

    def test_json_holds_no_control_character(
        self, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        done = run_here(capsys, "run", model, "-p", PROMPT, "--json", "--stop", "\x9b31m\x7f")
        assert json.loads(done.stdout)["options"]["stop"] == ["\x9b31m\x7f"]
        assert r"\u009b31m\u007f" in done.stdout.decode()
        assert not {*map(chr, range(127, 160))} & {*done.stdout.decode()}

    def test_a_seed_that_is_told(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        call = ("run", model, "-p", PROMPT, "-n", 20, "--temp", 2, "--ignore-eos")
        one, other = (run_here(capsys, *call) for _ in range(2))
        assert one.stdout != other.stdout
        (seed,) = re.findall(r", seed (\d+)\n", one.stderr.decode())
        again = run_here(capsys, *call, "--json", "-s", seed)
        values = json.loads(again.stdout)
        assert values["text"] + "\n" == one.stdout.decode()
        assert values["seed"] == int(seed)
        greedy = run_here(capsys, "run", model, "-p", PROMPT, "-n", 2, "--seed", 3)
        assert greedy.stderr.decode().startswith("note: --seed has no effect at temperature 0")
        assert "seed 3" not in greedy.stderr.decode()

    def test_llama_cpp_s_short_flags(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        short = ["-m", model, "-p", PROMPT, "-n", 9, "-t", 1, "-c", 64, "--temp", 0.5, "-s", 4]
        long = [model, "--prompt", PROMPT, "--max-tokens", 9, "--threads", 1, "--n-ctx", 64]
        long += ["--temperature", 0.5, "--seed", 4]
        one, other = (
            json.loads(run_here(capsys, "run", *flags, "--json").stdout) for flags in (short, long)
        )
        assert one | {"stats": None} == other | {"stats": None}

    @pytest.mark.parametrize(
        ("flags", "stdin", "text"),
        [
            (["-p", r"a\nb"], b"", r"a\nb"),
            (["-e", "-p", r"a\nb\t\\n\q\x41\xc3\xa9"], b"", "a\nb\t\\n\\qA\u00e9"),
            ([], b"a\n", "a\n"),
            ([], b"a\r\n", "a\r\n"),
            (["--chomp"], b"a\n\n", "a\n"),
            (["--chomp"], b"a\r\n", "a"),
            (["--chomp"], b"a", "a"),
            (["-p", "-"], b"\xef\xbb\xbfa\n", "a\n"),
        ],
    )
    def test_what_is_literal(
        self,
        flags: list[str],
        stdin: bytes,
        text: str,
        model: Path,
        engine: Engine,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        done = run_here(capsys, "run", model, *flags, "-n", 5, "--json")
        assert json.loads(done.stdout)["tokens"] == engine.generate(text, max_tokens=5).tokens

    def test_files_of_prompts(
        self,
        model: Path,
        engine: Engine,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = tmp_path / "prompt.txt"
        call = ("run", model, "-f", file, "-n", 5, "--json")
        file.write_bytes(b"\xef\xbb\xbfa\n")
        for flags, text in (([], "a\n"), (["--chomp"], "a")):
            done = run_here(capsys, *call, *flags)
            assert json.loads(done.stdout)["tokens"] == engine.generate(text, max_tokens=5).tokens
        file.write_bytes("a".encode("utf-16"))
        check_error(run_here(capsys, *call), "byte 0xff at offset 0: it begins as UTF-16 does")

    def test_escapes_in_stop_strings(
        self, engine: Engine, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["-p", "x", "--json", "--stop", r"\n"]
        for more, stop in (([], r"\n"), (["-e"], "\n")):
            values = json.loads(run_here(capsys, "run", model, *flags, *more).stdout)
            assert values["options"]["stop"] == [stop]

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

    def test_it_imports_what_it_needs(self, model: Path) -> None:
        """numpy alone would take 0.2 s, and the other commands as much."""
        code = (
            "import sys; from sbd_engine.cli.main import run; run(sys.argv[1:]);"
            "print({'numpy', 'sbd_engine.cli.sweep', 'sbd_engine.cli.run'} & {*sys.modules})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "run", model, "-p", PROMPT, "--max-tokens", "1"],
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines()[-1] == "{'sbd_engine.cli.run'}"

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
        "draft": adapter,
        "kv_budget": 2**30,
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
    taken = {
        f.name: f.default for f in fields(Parameters) if f.name not in ("options", "constraint")
    }
    taken |= dict.fromkeys(option.name for option in _core.OPTIONS)
    taken |= {name: given.default for name, given in signature(Engine).parameters.items()}
    rules: dict[str, Any] = {
        "min_p": 0.0625,
        "logit_bias": {5: -1.5, 7: 2.0},
        "repetition_penalty": 1.125,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logprobs": 3,
    }
    # Every prompt that eval asks is computed; sample_index tells samples of one call apart, of
    # which a command makes one.
    elsewhere = {"path", "prompt", "ignore_eos", "sample_index", "prefix_cache", "draft_lora"}
    elsewhere |= {"skip_special_tokens"}
    if command == "run":
        options |= rules
    else:
        elsewhere |= {*rules}
    assert {*options, *engine_options} == {*taken} - elsewhere
    assert all(value != taken[name] for name, value in (options | engine_options).items())

    made: dict[str, Any] = {}
    asked: list[dict[str, Any]] = []
    make = Engine.__init__

    def recorded_make(self: Engine, *arguments: Any, **named: Any) -> None:
        made.update(signature(make).bind(self, *arguments, **named).arguments)
        make(self, made["path"])

    def recorded(call: Any) -> Any:
        def record(self: Engine, prompt: Any, **named: Any) -> Any:
            if named["decoder"] == "ntp":  # what eval compares with
                return call(self, prompt, **named)
            asked.append(named)
            raise SbdValueError("seen enough")

        return record

    monkeypatch.setattr(Engine, "__init__", recorded_make)
    for name in "generate", "stream":
        monkeypatch.setattr(Engine, name, recorded(getattr(Engine, name)))
    line: list[Any] = ["--tasks", tasks]
    if command == "run":
        line = ["-p", "x", "--ignore-eos", "--json"]
    written = {"kv_budget": "1GiB", "logit_bias": ["5=-1.5", "7=2"]}
    for name, value in (engine_options | options).items():
        flag = "--threads" if name == "n_threads" else f"--{name.replace('_', '-')}"
        values = written.get(name, value)
        for each in values if isinstance(values, list) else [values]:
            line += [flag, each]
    done = run_here(capsys, command, model, *line)
    assert done.stderr == b"error: seen enough\n"
    assert asked == [options | ({"ignore_eos": True} if command == "run" else {})]
    assert {n: type(v)(made[n]) for n, v in engine_options.items()} == engine_options
    if command == "eval":
        assert made["prefix_cache"] == 0
