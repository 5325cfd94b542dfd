"""Events as the core gives them to a Session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Event:
    """What one forward did, made by hand."""

    committed: list[int] = field(default_factory=list)
    revealed: list[tuple[int, int, float, float]] = field(default_factory=list)
    finished: str | None = None
    prompt_rows: int = 0
    cached_tokens: int = 0
    scores: list[tuple[int, float, int, list[tuple[int, float]]]] = field(default_factory=list)
    accepted: int | None = None
    guesses: int = 0
    kind: str | None = None
    ran_thinking: bool = False
    age: float = 0.0

    def read(self) -> tuple[Any, ...]:
        prompt = (self.prompt_rows, self.cached_tokens)
        draft = (self.accepted, self.guesses, self.kind)
        told = (self.committed, self.revealed, self.finished, self.scores)
        return (*told, prompt, draft, self.ran_thinking, self.age)
