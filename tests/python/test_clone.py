"""Python as the README has it used: started in the clone's root, whose own `sbd_engine` folder
comes first and has no compiled engine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
USE = "from sbd_engine import Engine; Engine().close(); import sbd_engine.convert"


def python(*arguments: object, cwd: Path = ROOT, stdin: str = "") -> Any:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=60
    )


def test_the_readme_s_example() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    done = python("-", stdin=block)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\n    return a + b")


def test_the_readme_s_tasks() -> None:
    blocks = re.findall(r"^```text\n(\$ sbd-engine run -e .*?)^```$", README, re.M | re.S)
    line = r"^\$ sbd-engine (run -e (?:.*\\\n)*.*)\n((?:[^$].*\n)+)"
    tasks = [task for block in blocks for task in re.findall(line, block, re.M)]
    assert len(tasks) == 3
    for arguments, answer in tasks:
        done = python("-m", "sbd_engine", *shlex.split(arguments.replace("\\\n", "")))
        assert (done.returncode, done.stdout) == (0, answer)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the source in it, to write into."""
    (tmp_path / "sbd_engine").symlink_to(ROOT / "sbd_engine")
    return tmp_path


@pytest.mark.parametrize("way", ["-c", "stdin", "script", "-m", "-m pytest"])
def test_every_way_to_start(way: str, clone: Path) -> None:
    script = clone / "test_script.py"
    script.write_text(f"def test_it():\n    exec({USE!r})\ntest_it()\n")
    done = {
        "-c": lambda: python("-c", USE, cwd=clone),
        "stdin": lambda: python(cwd=clone, stdin=USE),
        "script": lambda: python(script, cwd=clone.parent),
        "-m": lambda: python("-m", "sbd_engine", "inspect", cwd=clone),
        "-m pytest": lambda: python("-m", "pytest", "-q", script, cwd=clone),
    }[way]()
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_of_it_is_the_installed_package(clone: Path) -> None:
    code = (
        "import sys, sbd_engine.cli.app, sbd_engine; from sbd_engine import Engine, SbdError\n"
        "sbd_engine.cli.app.parser_of()\n"
        "print({m.__file__.split('sbd_engine')[0] for n, m in sys.modules.items() "
        "if n.split('.')[0] == 'sbd_engine'})"
    )
    done = python("-c", code, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert str(clone) not in done.stdout


def test_without_an_installation_one_clear_error(clone: Path) -> None:
    done = python("-S", "-c", "import sbd_engine", cwd=clone)  # -S: no site-packages
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"ImportError: sbd_engine is not installed in \S+, and \S+ is a clone's source without the "
        r"compiled engine: start the Python it is installed in .*, or pip install \.",
        last,
    )
