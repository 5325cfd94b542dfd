"""Where chat templates run: a process that is ended when one spends more than it may."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from . import chat_worker
from .errors import SbdFileError, SbdValueError

REQUEST_BYTES = 16 << 20  # far beyond any context; what the process may take grows with it
_ANSWER_BYTES_PER_CHARACTER = 12  # a character as two escapes of JSON
_KEPT = ("LD_LIBRARY_PATH", "PATH", "TZ")  # of the environment: a template needs none of it
_LENGTH_BYTES = 8


class TemplateProcess:
    """Renders templates in turn, in a process that starts with the first and is kept for the next.
    Safe to use from several threads, and in a forked child, which starts its own.

    cpu_seconds: what one rendering may take; its memory and its text grow with the conversation.
    """

    def __init__(self, cpu_seconds: float = 2.0) -> None:
        self._cpu_seconds = cpu_seconds
        self._begin()

    def _begin(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def render(self, template: str, variables: Mapping[str, Any], now: float) -> str:
        """The template's text. Raises SbdValueError where it fails or spends too much."""
        try:
            request = json.dumps({"template": template, "variables": variables, "now": now})
        except (RecursionError, ValueError) as error:
            raise SbdValueError(f"expected a conversation that JSON can hold: {error}") from None
        data = request.encode()
        if len(data) > REQUEST_BYTES:
            raise SbdValueError(
                f"expected a conversation of at most {REQUEST_BYTES} bytes with its chat template, "
                f"got {len(data)}"
            )
        if self._owner != os.getpid():
            self._begin()  # a parent's process is none of a forked child's
        with self._lock:
            try:
                answer = self._ask(data)
            except BaseException:  # a KeyboardInterrupt as well: its answer is still to come
                self._end()
                raise
        if "problem" in answer:
            raise SbdValueError(f"the model's chat template {answer['problem']}")
        return answer["text"]

    def _ask(self, data: bytes) -> dict[str, str]:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # somebody else ended it
        most = chat_worker.TEXT_CHARACTERS + chat_worker.TEXT_PER_BYTE * len(data)
        try:
            process = self._process or self._start()
            assert process.stdout
            _send(process, data)
            head = process.stdout.read(_LENGTH_BYTES)
            size = int.from_bytes(head, "little")
            if len(head) == _LENGTH_BYTES and size <= 1000 + _ANSWER_BYTES_PER_CHARACTER * most:
                answer: dict[str, str] = json.loads(process.stdout.read(size))
                return answer
        except (BrokenPipeError, json.JSONDecodeError):
            pass
        return {"problem": self._ending()}

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", chat_worker.__file__, str(self._cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
            )
        except OSError as error:
            raise SbdFileError(
                f"cannot start {sys.executable!r}, in which chat templates run: {error}"
            ) from None
        self._process, self._at_exit = process, weakref.finalize(self, _kill, process, self._owner)
        _send(process, json.dumps([os.path.abspath(path) for path in sys.path]).encode())
        return process

    def _ending(self) -> str:
        """Why the process gave no answer."""
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=1)
        self._end()
        if code == -signal.SIGPROF:
            return f"took more than its {self._cpu_seconds:g} s of processor time"
        if code == -signal.SIGALRM:
            return f"took more than its {chat_worker.WALL_SECONDS} s"
        return f"ended the process that it runs in (exit code {code})"

    def _end(self) -> None:
        if self._process is not None:
            self._at_exit()
            self._process = None


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    process.stdin.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    process.stdin.flush()


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what was still to be written
            if pipe:
                pipe.close()
    process.wait()
