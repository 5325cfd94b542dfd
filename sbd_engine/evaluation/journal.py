"""Results on disk as they come, so that a run which was cut off can go on."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import SbdFileError, SbdValueError


class Journal:
    """A JSONL file: the settings in the first line, a result in each line after it.

    A file that is there goes on where it ended; a last line that was cut off in the middle is
    dropped. `lines` are its results. Without a path nothing is written. Raises SbdValueError where
    the file has other settings, or is something else.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        if path is None:
            return
        settings = json.loads(json.dumps(settings))  # as it will be read
        try:
            kept = self._read(path, settings) if path.exists() else 0
            self._file = self._open(path, kept)
            if kept == 0:
                self._write({"settings": settings})
        except OSError as error:
            raise SbdFileError(f"{path}: cannot be written: {error.strerror}") from None

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    @staticmethod
    def _open(path: Path, kept: int) -> TextIO:
        file = path.open("r+" if path.exists() else "w", encoding="utf-8", newline="\n")
        file.truncate(kept)
        file.seek(0, 2)
        return file

    def _read(self, path: Path, settings: dict[str, Any]) -> int:
        """Fills `lines`; returns how many bytes of the file stay."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            if data:
                raise SbdValueError(f"{path}: expected results of this command: move it away")
            return 0
        try:
            head, *lines = [json.loads(line) for line in whole.decode()[:-1].split("\n")]
            before = head["settings"]
        except (ValueError, KeyError, TypeError):
            raise SbdValueError(f"{path}: expected results of this command: move it away") from None
        if before != settings:
            key, old, new = _difference("", before, settings)
            raise SbdValueError(
                f"{path}: holds results with {key} {old}, this run has {new}: "
                "give another file, or move that one away"
            )
        self.lines = lines
        return len(whole)

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


def _difference(key: str, before: Any, now: Any) -> tuple[str, str, str]:
    """The first one, as deep as both have the same keys on the way to it."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return _difference(f"{key} {name}".strip(), before.get(name), now.get(name))
    return key, _shown(before), _shown(now)


def _shown(value: Any) -> str:
    return "none" if value is None else f"{json.dumps(value, ensure_ascii=False):.60}"
