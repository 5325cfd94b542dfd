"""The `sbd-engine` command as tests run it: as a process, inside this one, or on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from sbd_engine.cli import main

COMMAND = Path(sys.executable).parent / "sbd-engine"
PROMPT = "Hello the world"
CLEAR = "\x1b[2J"  # a terminal that is told so clears its screen


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


def on_a_terminal(*arguments: object, columns: int = 300, lines: int = 50) -> str:
    """All that a command writes to its screen, without the escape sequences."""
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    unsized = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=child,
        stdout=child,
        stderr=subprocess.DEVNULL,
        env=unsized | {"TERM": "xterm"},
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


def check_error(done: Any, complaint: str) -> None:
    """Exit code 2, and one line on standard error that holds the complaint."""
    output, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 2, errors
    assert errors.startswith("error: ")
    assert complaint in errors
    assert errors.count("\n") == 1
    assert "\x1b" not in errors
    assert output == ""
