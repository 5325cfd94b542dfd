"""Bad input: exit code 2 and one line that says what is wrong, in the words of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from python.command import CLEAR, check_error, run, run_here
from python.tiny_model import with_template

from sbd_engine.cli import options


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["-p", ""], "empty"),
            (["-p", b"\xff"], "UTF-8"),
            (["-p", "x" * 600], "the context of 512 tokens, got 601 tokens: shorten it\n"),
            (["-p", "x", "-f", "y"], "got both"),
            (["-f", "missing.txt"], "missing.txt: no such file"),
            (["-f", "/"], "cannot be read"),
            (["-p", "x", "--block-size", 0], "expected --block-size >= 1, got 0"),
            (["-p", "x", "--block-size", 513], "--block-size from 1 to the context of 512"),
            (["-p", "x", "--gamma", -1], "expected --gamma >= 0, got -1"),
            (["-p", "x", "--gamma", "nan"], "got nan"),
            (["-p", "x", "--gamma", "much"], "--gamma"),
            (["-p", "x", "--temperature", -1], "expected --temperature "),
            (["-p", "x", "--top-p", 0], "expected --top-p "),
            (["-p", "x", "--top-p", 1.01], "expected --top-p "),
            (["-p", "x", "--top-k", -1], "expected --top-k "),
            (["-p", "x", "--max-tokens", 0], "expected --max-tokens >= 1, got 0"),
            (["-p", "x", "--threads", 0], "expected --threads >= 1, got 0"),
            (["-p", "x", "--n-ctx", 0], "expected --n-ctx >= 1, got 0"),
            (["-p", "x", "--n-ctx", 10**6], "--n-ctx must be between 1 and the model's 512"),
            (["-p", "x", "--device", "gpu"], '--device "gpu": expected auto, cpu, cuda or cuda:N'),
            (["-p", "x", "--decoder", "sdb"], 'unknown --decoder "sdb"'),
            (
                ["-p", "x", "--unmask", "all"],
                'unknown --unmask "all": expected one of entropy_bounded',
            ),
            (["-p", "x", "--kv-dtype", "f64"], "unknown --kv-dtype"),
            (
                ["-p", "x", "--kv-dtype", "q8_0", "--device", "cuda"],
                "--kv-dtype q8_0: a GPU holds f16, bf16 or f32, --device cpu this one too",
            ),
            (["-p", "x", "--seed", -1], "expected --seed >= 0, got -1"),
            (["-p", "x", "--stop", ""], "expected --stop "),
            (["-p", "x", "--json", "--show-blocks"], "got both"),
            (["-p", "x", "--trace"], "--trace has no effect without --json"),
            (["-p", "x", "--delay", 1], "--delay has no effect without --show-blocks"),
            (["-p", "x", "--keep-blocks", "--delay", "nan"], "expected --delay as seconds >= 0"),
            (["-p", "x", "--chomp"], "--chomp has no effect with --prompt"),
            (["-f", __file__, "--escape"], "--escape has no effect without --prompt"),
            (["-p", "\\xff", "-e"], "--prompt, unescaped: expected UTF-8 text, got byte 0xff"),
            (["-p", "x", "-m", "other.bin"], "expected the model as MODEL or --model, got both"),
            (
                ["-p", "x", "--factor", 1, "--gamma", 1],
                "one of --gamma, --factor, --conf",
            ),
            (["-p", "x" * 600, "-c", 100], "shorten it or raise --n-ctx (the model takes 512)"),
            (["-p", "x", "--no-such-flag"], "--no-such-flag"),
            (["-p"], "requires an argument"),
        ],
    )
    def test_run(
        self, model: Path, flags: list[Any], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        check_error(run_here(capsys, "run", model, *flags), complaint)

    @pytest.mark.parametrize("command", [["run", "-p", "x"], ["inspect"], ["bench"]])
    def test_model_files(
        self, command: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = tmp_path / "bad.bin"
        verb, *flags = command
        check_error(run_here(capsys, verb, bad, *flags), "no such file")
        check_error(run_here(capsys, verb, tmp_path, *flags), "folder")
        whole = model.read_bytes()
        for content in (b"", b"no gguf at all" * 10, whole[: len(whole) // 2], whole[:-1]):
            bad.write_bytes(content)
            check_error(run_here(capsys, verb, bad, *flags), "bad.bin")

    def test_the_installed_command(self, model: Path) -> None:
        check_error(run("run", "missing.bin", "-p", "x"), "missing.bin: no such file")
        check_error(run("run", model, "-p", "x", "--gamma", "nan"), "--gamma >= 0, got nan")
        check_error(run("walk"), "walk")

    def test_prompt_on_stdin(self, model: Path) -> None:
        check_error(run("run", model, stdin=b""), "empty")
        check_error(run("run", model, stdin=b"ab\xff"), "byte 0xff at offset 2")

    def test_no_gpu(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        call = ("run", model, "-p", "x", "--max-tokens", 1, "--device")
        if run_here(capsys, *call, "cuda").returncode == 0:
            return  # there is one
        for device in ("cuda", "cuda:1"):
            check_error(run_here(capsys, *call, device), "device cuda: ")
        assert run_here(capsys, *call, "auto").returncode == 0

    def test_what_a_model_lacks(
        self, plain_model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        call = ("run", plain_model, "-p", "x")
        check_error(run_here(capsys, *call, "--chat"), "no chat template")
        check_error(run_here(capsys, *call, "--decoder", "sbd"), "mask")

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--template-arg", "x=1"], "--template-arg has no effect without --chat"),
            (["--chat", "--template-arg", "x"], "--template-arg NAME=VALUE"),
            (["--chat", "--template-arg", "messages=[]"], "got 'messages=[]'"),
            (["--chat", "--template-arg", "self=1"], "got 'self=1'"),
            (["--chat", "--template-arg", "chat_template=rag"], "expected one of default"),
            (["--chat", "--template-arg", "tools=1"], "expected tools as a list"),
        ],
    )
    def test_template_arguments(
        self, flags: list[str], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        check_error(run_here(capsys, "run", model, "-p", "x", *flags), complaint)

    @pytest.mark.parametrize(
        ("template", "complaint"),
        [
            ("{{ 'a' * 10**10 }}", "needs more memory than its 128 MiB"),
            (f"{{{{ raise_exception('{CLEAR}no') }}}}", r"refused the conversation: \x1b[2Jno"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed: RecursionError"),
            ("{{ 1 // 0 }}", "failed: ZeroDivisionError"),
            ("{% if %}", "failed: Expected an expression"),
        ],
    )
    def test_chat_templates(
        self, template: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = with_template(tmp_path, template)
        check_error(run_here(capsys, "run", model, "-p", "x", "--chat"), complaint)

    def test_debug_shows_where(self) -> None:
        done = run("run", "missing.bin", "-p", "x", "--debug")
        assert done.returncode != 0
        assert b"Traceback" in done.stderr


def test_a_note_is_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    options.note(f"a {CLEAR}name\nerror: none")
    assert capsys.readouterr().err == "note: a [2Jname error: none\n"


def test_help_and_version() -> None:
    assert run("--version").stdout.decode().startswith("sbd-engine ")
    for arguments in ([], ["--help"], ["-h"]):
        done = run(*arguments)
        assert done.returncode == 0
        for name in ("run", "chat", "inspect", "bench", "convert"):
            assert name in done.stdout.decode()
        assert done.stderr == b""
    assert "--gamma" in run("run", "--help").stdout.decode()
    assert "--mask-token" in run("convert", "--help").stdout.decode()


@pytest.mark.parametrize("command", ["run", "chat", "inspect", "bench", "eval", "sweep", "convert"])
def test_short_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (run_here(capsys, command, flag) for flag in ("-h", "--help"))
    assert short.returncode == 0
    assert short.stdout == long.stdout
    assert b"Usage" in short.stdout


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("command", ["run", "chat", "eval", "bench"])
def test_help_names_every_flag_whole(command: str, columns: int) -> None:
    text = run(command, "--help", COLUMNS=str(columns)).stdout.decode()
    assert "\u2026" not in text
    for flag in ("--kv-dtype", "--threads"):
        assert flag in text
    if command != "bench":
        assert "--decoded-token-threshold" in text


def test_arguments_become_flags() -> None:
    said = "`gamma`, `n_threads`, `kv_dtype` and `top_p`: not `field`, gamma or sbd.`gamma"
    assert options.in_flags(said) == (
        "--gamma, --threads, --kv-dtype and --top-p: not `field`, gamma or sbd.`gamma"
    )
