"""A peer seen from the benchmark: a process that is stopped whenever it is not its turn, so that no
spinning thread pool of one peer takes a core from another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .worker import Missing

_FOLDER = Path(__file__).parent.parent


class PeerError(RuntimeError):
    """A peer that had started failed."""


class Process:
    """Starts `module` with `options` and waits until it is loaded. Raises Missing or PeerError."""

    def __init__(self, module: str, options: dict[str, Any], log: Path) -> None:
        self._module = module
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "peers.worker", module, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_FOLDER,
            )
        first = self._read()
        if "missing" in first:
            self.close()
            raise Missing(first["missing"])
        self.about: str = first["about"]
        self._signal(signal.SIGSTOP)

    def call(self, method: str, **arguments: Any) -> Any:
        """The method's result; the peer runs only meanwhile."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"call": method, **arguments}) + "\n")
            self._process.stdin.flush()
            reply = self._read()
        except BrokenPipeError:
            raise PeerError(f"{self._module} ended; see {self._log}") from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in reply:
            raise PeerError(f"{self._module}: {reply['error']}; see {self._log}")
        return reply["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(
                f"{self._module} ended with status {self._process.wait()}; see {self._log}"
            )
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)
