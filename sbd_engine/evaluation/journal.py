"""Results on disk as they come, so that a run which was cut off can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import SbdFileError, SbdValueError
from ..json_values import parse_json
from .locked_file import open_locked

_RUN = "run"  # of a line: which settings it was made with


class Journal:
    """A JSONL file: the settings in the first line, a result in each line after it.

    A file that is there goes on where it ended. `lines` are its results; `left_out` counts the
    lines that are none of this run's: cut off, damaged, or of another run. What `fits` refuses is
    damaged. While it is open, no other process gets the file. Without a path nothing is written.

    Raises SbdValueError where the file has other settings, or is something else, and SbdFileError
    where it cannot be had or written.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        fits: Callable[[dict[str, Any]], bool] = lambda line: True,
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        self.left_out = 0
        self._file: FileIO | None = None
        if path is None:
            return
        self._path, self._fits = path, fits
        self._settings = json.loads(json.dumps(settings))  # as it will be read
        text = json.dumps(self._settings, sort_keys=True)
        self._run = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._file = open_locked(path)
        try:
            self._begin(self._file)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: dict[str, Any]) -> None:
        if self._file:
            self._write({**line, _RUN: self._run})
        self.lines.append(line)

    def _begin(self, file: FileIO) -> None:
        """Reads what is there, and brings the file to where the next line goes."""
        data = file.readall()
        assert data is not None
        has_settings = self._read(data)
        self._end = len(data)
        if not data.endswith(b"\n"):
            tail = data[data.rfind(b"\n") + 1 :]
            if _parsed(tail) is None:  # cut off in the middle
                self._end -= len(tail)
                file.truncate(self._end)
            else:
                self._put(b"\n")
        if not has_settings:
            try:
                self._write({"settings": self._settings})
            except SbdFileError:
                if not data:
                    self._path.unlink(missing_ok=True)
                raise

    def _read(self, data: bytes) -> bool:
        """Fills `lines`; whether the settings stand in the file."""
        others: list[Any] = []  # settings of other runs
        has_settings = False
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            value = _parsed(line)
            if value is not None and value.pop(_RUN, None) == self._run and self._fits(value):
                self.lines.append(value)
            elif value is not None and value.get("settings") == self._settings:
                has_settings = True
            else:
                self.left_out += 1
                if value is not None and "settings" in value:
                    others.append(value["settings"])
        if self.left_out and not self.lines and not has_settings:
            if not others:
                raise SbdValueError(f"{self._path}: expected results of this command: move it away")
            key, old, new = _difference("", others[0], self._settings)
            raise SbdValueError(
                f"{self._path}: holds results with {key} {old}, this run has {new}: "
                "give another file, or move that one away"
            )
        return has_settings

    def _write(self, line: dict[str, Any]) -> None:
        self._put((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def _put(self, data: bytes) -> None:
        """Whole, or not at all."""
        assert self._file
        try:
            self._file.seek(self._end)
            rest = data
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._end)
            raise SbdFileError(
                f"{self._path}: cannot be written: {error.strerror}; it has {len(self.lines)} "
                "answers: the same command goes on from them"
            ) from None
        self._end += len(data)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line.decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _difference(key: str, before: Any, now: Any) -> tuple[str, str, str]:
    """The first one, as deep as both have the same keys on the way to it."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return _difference(f"{key} {name}".strip(), before.get(name), now.get(name))
    return key, _shown(before), _shown(now)


def _shown(value: Any) -> str:
    return "none" if value is None else f"{json.dumps(value, ensure_ascii=False):.60}"
