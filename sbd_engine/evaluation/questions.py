"""Questions with exact answers, and prompts without: the shipped ones, or a user's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import SbdError, SbdFileNotFoundError, SbdValueError
from ..json_values import parse_json
from ..parameters import one_of, unknown
from ..text_file import read_text
from .scoring import EXACT, SCORES, check_answer

SHIPPED = "exact.jsonl"


@dataclass(frozen=True)
class Question:
    """answer: None in a file of prompts. source: where it stands, for errors. score: of SCORES."""

    prompt: str
    answer: str | None
    family: str
    source: str
    score: str = EXACT


def read_tasks(path: Path | None, score: str = EXACT) -> list[Question]:
    """One JSON object a line: "prompt", "answer", where there are several kinds "family", and where
    it is not `score` "score". None is the shipped file: tasks held out from the demo model's
    training."""
    if path is None:
        text, name = _shipped(), SHIPPED
    else:
        text, name = read_text(path), str(path)
    return _some(
        [_question(fields, source, score) for source, fields in _objects(text, name)],
        name,
        "prompt and answer",
    )


def _question(fields: dict[str, Any], source: str, score: str) -> Question:
    prompt, answer = _string(fields, "prompt", source), _string(fields, "answer", source)
    family = _family(fields, source)
    try:
        score = one_of("score", fields.get("score", score), list(SCORES))
        check_answer(score, answer)
    except SbdError as error:
        raise SbdValueError(f"{source}: {error}") from None
    return Question(prompt, answer, family, source, score)


def read_prompts(path: Path) -> list[Question]:
    """A prompt a line; of a .jsonl file, each line's "prompt", and "family" where there is one.
    Empty lines count for nothing."""
    text, name = read_text(path), str(path)
    if path.suffix == ".jsonl":
        prompts = [
            Question(_string(fields, "prompt", source), None, _family(fields, source), source)
            for source, fields in _objects(text, name)
        ]
    else:
        prompts = [Question(line.rstrip("\r"), None, "", s) for s, line in _lines(text, name)]
    return _some(prompts, name, "prompt")


def select(
    questions: Sequence[Question], families: Sequence[str] | None, limit: int | None
) -> list[Question]:
    """Those of the named families, the first `limit` of each."""
    known = list(dict.fromkeys(question.family for question in questions))
    for family in families or ():
        if family not in known:
            raise SbdValueError(unknown("family", family, [name or "''" for name in known]))
    taken: dict[str, int] = {}
    chosen = []
    for question in questions:
        if families and question.family not in families:
            continue
        taken[question.family] = taken.get(question.family, 0) + 1
        if limit is None or taken[question.family] <= limit:
            chosen.append(question)
    return chosen


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """Equal for equal questions in the same order, wherever they stand."""
    fields = [{**asdict(question), "source": ""} for question in questions]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def _shipped() -> str:
    file = files("sbd_engine") / "tasks" / SHIPPED
    if not file.is_file():
        raise SbdFileNotFoundError(
            f"this installation has no tasks (sbd_engine/tasks/{SHIPPED}): give --tasks FILE"
        )
    return file.read_text(encoding="utf-8")


def _lines(text: str, name: str) -> Iterator[tuple[str, str]]:
    """Those with something on them, each with where it stands. Some editors begin a file with a
    byte order mark, and files may be joined."""
    for number, line in enumerate(text.split("\n"), 1):
        content = line.removeprefix("\ufeff")
        if content.strip():
            yield f"{name}, line {number}", content


def _objects(text: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    objects = []
    for source, line in _lines(text, name):
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise SbdValueError(f"{source}: expected a JSON object, got no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise SbdValueError(f"{source}: expected a JSON object, got {type(fields).__name__}")
        objects.append((source, fields))
    return objects


def _string(fields: dict[str, Any], key: str, source: str) -> str:
    if key not in fields:
        got = ", ".join([*fields][:8]) or "{}"
        raise SbdValueError(f'{source}: expected a "{key}", got only {got:.80}')
    value = fields[key]
    if not isinstance(value, str):
        got = type(value).__name__ if isinstance(value, (dict, list)) else f"{value!r:.40}"
        raise SbdValueError(f'{source}: expected "{key}" as a string, got {got}')
    if not value.strip():
        raise SbdValueError(f'{source}: expected a "{key}" that is not empty')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SbdValueError(f'{source}: expected "{key}" as text, got half a character') from None
    return value


def _family(fields: dict[str, Any], source: str) -> str:
    return _string(fields, "family", source) if "family" in fields else ""


def _some(questions: list[Question], name: str, fields: str) -> list[Question]:
    if not questions:
        raise SbdValueError(f"{name}: expected a line with {fields}, got an empty file")
    return questions
