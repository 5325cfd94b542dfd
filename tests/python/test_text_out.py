"""Names, keys, tokens and texts of a file or a request: whatever stands in them, no line, no escape
sequence and no change of direction is forged in tables, JSON and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sbd_engine import SbdValueError
from sbd_engine.cli import options
from sbd_engine.convert import ConvertError

from .command import call_here, on_a_terminal
from .hostile import llama_keys, llama_shapes, write_sparse

EVIL = "a\x1b[2J\x9b31m\x7f\u202eb\u2066\u2028\nerror: c\r"
OBEYED = [*map(chr, (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))]


def check(text: str, lines: int) -> None:
    assert text.count("\n") == lines
    assert not any(letter in text for letter in OBEYED if letter != "\n")
    assert "error: c" not in text.splitlines()


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    keys = llama_keys() | {"general.name": EVIL, f"sbd.{EVIL}": EVIL, "tokenizer.ggml.model": EVIL}
    shapes = dict(llama_shapes()) | {EVIL: (1,)}
    return write_sparse(tmp_path / "model.bin", keys, shapes)


def test_inspect(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call_here(capsys, "inspect", evil, "--tensors")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    check(out, len(lines))
    assert sum("error: c" in line for line in lines) >= 4  # each within a line of its own
    check(on_a_terminal("inspect", evil, "--tensors").replace("\r\n", "\n"), len(lines))


def test_json(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call_here(capsys, "inspect", evil, "--tensors", "--json")
    assert (code, err) == (0, "")
    check(out, 1)
    assert "\u2028" not in out
    assert json.loads(out)["name"] == EVIL


@pytest.mark.parametrize(
    "command",
    [
        ["run", "-p", "a"],
        ["bench"],
        ["eval", "--tasks", "TASKS"],
        ["perplexity", "TASKS"],
        ["set", EVIL],
        ["set", f"{EVIL}=1"],
        ["set", f"gamma={EVIL}"],
        ["inspect", f"--{EVIL}"],
        ["run", "-p", "a", "--decoder", EVIL],
        ["run", "-p", "a", "--unmask", EVIL],
        ["run", "-p", "a", "--logit-bias", EVIL],
        ["run", "-p", "a", "--kv-budget", EVIL],
        ["run", "-p", "a", "--device", EVIL],
        ["run", "-p", "a", "--chat", "--template-arg", EVIL],
        ["eval", "--tasks", EVIL],
        ["sweep", "--gammas", EVIL],
        ["convert", EVIL, "-o", "x.bin"],
    ],
)
def test_errors(
    command: list[str], evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks"
    tasks.write_text(json.dumps({"prompt": "a", "answer": "b", "family": EVIL, "score": EVIL}))
    verb, *rest = (str(tasks) if part == "TASKS" else part for part in command)
    model = [] if verb in ("sweep", "convert") else [str(evil)]
    code, out, err = call_here(capsys, verb, *model, *rest)
    assert (code, out) == (2, "")
    check(err, 1)


@pytest.mark.parametrize("kind", [SbdValueError, ConvertError])
def test_an_error_is_one_line_wherever_it_is_shown(kind: type[Exception]) -> None:
    check(str(kind(EVIL)), 0)
    assert str(kind("a  b, expected 'é🙂'")) == "a b, expected 'é🙂'"
    long = str(kind("what is wrong: " + "x" * 10**6 + "; how to mend it"))
    assert long.startswith("what is wrong") and long.endswith("how to mend it")
    assert len(long) == 1000


def test_what_a_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert options.terminal_safe(EVIL) == "a[2J31mb\u2028\nerror: c"
    options.print_json({EVIL: EVIL})
    out = capsys.readouterr().out
    check(out, 1)
    values: Any = json.loads(out)
    assert values == {EVIL: EVIL}
