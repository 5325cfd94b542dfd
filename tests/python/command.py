"""The `sbd-engine` command as tests run it: as a process, inside this one, or on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
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


def call_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command without a process, which would
    take most of the time."""
    code = main.run(
        [a.decode(errors="surrogateescape") if isinstance(a, bytes) else str(a) for a in arguments]
    )
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The same, as `run` gives it."""
    code, out, err = call_here(capsys, *arguments)
    return subprocess.CompletedProcess(arguments, code, out.encode(), err.encode())


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
    check_refused((done.returncode, done.stdout.decode(), done.stderr.decode()), complaint)


def check_refused(done: tuple[int, str, str], complaint: str) -> None:
    """The same, of `call_here`."""
    code, output, errors = done
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert complaint in errors
    assert errors.count("\n") == 1
    assert "\x1b" not in errors
    assert output == ""


class Terminal:
    """A command on a terminal that somebody types at."""

    def __init__(self, *arguments: object, columns: int = 200, **environment: str) -> None:
        self._main, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        unsized = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [COMMAND, *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - for Ctrl-C
            env=unsized | {"TERM": "dumb"} | environment,
        )
        os.close(child)
        self.screen = ""
        self._read = 0  # characters of it that were waited for

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C. Between writing its prompt and waiting for a key readline hears no signal."""
        time.sleep(0.1)
        self.type("\x03")

    def wait_for(self, text: str, seconds: float = 20) -> str:
        """What comes up to the text, it included."""
        end = time.monotonic() + seconds
        while (at := self.screen.find(text, self._read)) < 0:
            assert self._come(end), f"no {text!r} in {self.screen[self._read :]!r}"
        come = self.screen[self._read : at + len(text)]
        self._read = at + len(text)
        return come

    def wait_for_length(self, length: int, seconds: float = 20) -> None:
        """Until so much has come up, whatever it is."""
        end = time.monotonic() + seconds
        while len(self.screen) < length:
            assert self._come(end), f"no {length} characters: {self.screen!r}"

    def end(self, seconds: float = 20) -> int:
        """Its exit code, once it has ended."""
        end = time.monotonic() + seconds
        while self._come(end):
            pass
        os.close(self._main)
        return self.process.wait(timeout=5)

    def _come(self, end: float) -> bool:
        """Whether there is more to see, until then."""
        left = max(0, end - time.monotonic())
        if not select.select([self._main], [], [], left)[0]:
            return False
        try:
            data = os.read(self._main, 65536)
        except OSError:  # how Linux says that the other end has closed
            return False
        self.screen += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)
