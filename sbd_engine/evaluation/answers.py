"""Many prompts and their answers, as `generate` writes them: what is asked, and each one's line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import SbdError
from ..json_values import finite
from ..model_file import model_file
from .answering import encoded, file_fingerprint
from .journal import Journal
from .questions import Question, questions_fingerprint


@dataclass(frozen=True)
class Answers:
    """calls: Engine.generate's arguments for each question. settings: what must be equal for a run
    to go on from another's answers. Both are checked, and need no engine any more."""

    questions: Sequence[Question]
    calls: list[dict[str, Any]]
    settings: dict[str, Any]

    @staticmethod
    def asked(
        engine: Engine,
        model: Path | None,
        kv_dtype: str,
        questions: Sequence[Question],
        options: Mapping[str, Any],
        template: Mapping[str, Any] | None,
    ) -> Answers:
        """model, kv_dtype: the engine's. options: of Engine.generate, for all. template: of the
        chat template, which each prompt goes into; None is without. Raises SbdError, before
        anything is written."""
        sampled = options.get("temperature", 0) > 0
        calls = []
        for number, question in enumerate(questions):
            call = {**options, "sample_index": number} if sampled else {**options}
            try:
                call["prompt"] = encoded(engine, question.prompt, template)
                engine.check(**call)
            except SbdError as error:
                raise type(error)(f"{question.source}: {error}") from None
            calls.append(call)
        with model_file(model) as path:
            content = file_fingerprint(path)
        # Threads, batch and whatever drafts change no answer.
        settings = {
            "model": content,
            "prompts": questions_fingerprint(questions),
            "chat": template is not None,
            "template_args": dict(template or {}),
            "options": finite(engine.resolve(**options)),
            "n_ctx": engine.n_ctx,
            "kv_dtype": kv_dtype,
        }
        return Answers(questions, calls, settings)

    def journal(self, out: Path | None) -> Journal:
        return Journal(out, self.settings, self._fits)

    def left(self, journal: Journal) -> list[int]:
        """The questions' numbers that it lacks."""
        done = {line["number"] for line in journal.lines}
        return [number for number in range(len(self.calls)) if number not in done]

    def line(
        self, number: int, text: str, tokens: list[int], finish_reason: str, nfe: int
    ) -> dict[str, Any]:
        question, call = self.questions[number], self.calls[number]
        own = {name: call[name] for name in ("sample_index",) if name in call}
        return {
            "number": number,
            "prompt": question.prompt,
            **({"family": question.family} if question.family else {}),
            "prompt_ids": call["prompt"],
            "text": text,
            "tokens": tokens,
            "finish_reason": finish_reason,
            "nfe": nfe,
            "options": {**self.settings["options"], **own},
        }

    def _fits(self, line: dict[str, Any]) -> bool:
        number = line.get("number")
        if not isinstance(number, int) or not 0 <= number < len(self.questions):
            return False
        tokens = line.get("tokens")
        return line.get("prompt") == self.questions[number].prompt and isinstance(tokens, list)
