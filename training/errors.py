"""Bad input, said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FINGERPRINT = 64  # hex digits of a checkpoint's or of data: not for people


class TrainingError(ValueError):
    """What is wrong, with the expected and the actual value, and how to mend it."""


class AnotherRunError(TrainingError):
    """A folder's run was begun with other settings; `settings` has then and now, by name."""

    def __init__(self, out: Path, settings: Mapping[str, tuple[Any, Any]]) -> None:
        self.out, self.settings = out, settings
        super().__init__(self.told({}))

    def told(self, names: Mapping[str, str]) -> str:
        """The line, with the settings' names as the user gives them."""
        changes = []
        for setting, (then, now) in self.settings.items():
            fingerprint = isinstance(then, str) and len(then) == FINGERPRINT
            change = "is another" if fingerprint else f"was {then}, is {now}"
            changes.append(f"{names.get(setting, setting)} {change}")
        return (
            f"{self.out} belongs to another run: {'; '.join(changes)}; go on as it began, or in "
            "another folder"
        )
