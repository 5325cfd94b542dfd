"""A model's own answers: made by the installed `sbd-engine`, read, and put into batches."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError
from training.examples import Example
from training.examples import Sequence as Documents
from training.texts import PackedTexts, files_in

SUFFIXES = (".txt", ".jsonl")  # of prompts, as `generate` takes them
INTERRUPTED = 130
HELD_OUT = 16  # of so many prompts one is held out


@dataclass(frozen=True)
class Answer:
    """`tokens`: of the prompt and what the model wrote behind it."""

    kind: str  # of its prompt; "" where there are none
    prompt: str
    tokens: NDArray[np.int32]
    prompt_length: int
    greedy: bool

    @property
    def example(self) -> Example:
        return Example(self.tokens, self.prompt_length)


def make_answers(model: Path, prompts: Path, folder: Path, options: dict[str, list[str]]) -> None:
    """The answers to each file of prompts, once for each of `options`: arguments of `generate` by a
    name. What is in `folder` already is not made again."""
    command = Path(sys.executable).with_name("sbd-engine")
    program = str(command) if command.exists() else shutil.which("sbd-engine")
    if program is None:
        raise TrainingError(
            "the answers are made by sbd-engine, which is not installed here: install it, or give "
            "--answers"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in files_in(prompts, SUFFIXES):
        for name, arguments in options.items():
            out = folder / f"{file.stem}.{name}.jsonl"
            print(f"{out}: answers to {file}, {name}", file=sys.stderr, flush=True)
            paths = ["--model", model, "--prompts", file, "--out", out]
            done = subprocess.run([program, "generate", *map(str, paths), *arguments])
            if done.returncode == INTERRUPTED:
                raise KeyboardInterrupt
            if done.returncode:
                raise TrainingError(f"sbd-engine generate ended with {done.returncode}: see above")


def read_answers(path: Path, length: int, vocab_size: int) -> list[Answer]:
    """What `sbd-engine generate` wrote into a file or a folder's files, cut to `length` tokens;
    those with fewer than two tokens of the model's own within it are left out."""
    answers = [
        answer
        for file in files_in(path, (".jsonl",))
        for answer in _answers_of(file, length, vocab_size)
    ]
    if not answers:
        raise TrainingError(f"{path}: no answer of two tokens or more within {length} tokens")
    return answers


def _answers_of(file: Path, length: int, vocab_size: int) -> Iterable[Answer]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{file}: not UTF-8 at byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line or "{}")
        except ValueError:
            continue  # cut off as it was written
        if "tokens" not in value:
            continue
        try:
            given, new = value["prompt_ids"], value["tokens"]
            tokens = np.array([*given, *new], dtype=np.int32)
            greedy = float(value["options"]["temperature"]) == 0
            kind, prompt = str(value.get("family", "")), str(value["prompt"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise TrainingError(
                f"{file}:{number}: expected an answer as sbd-engine generate writes it"
            ) from None
        if tokens.ndim != 1 or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
            raise TrainingError(
                f"{file}:{number}: a token that is none of the {vocab_size} of this model: are "
                "these its answers?"
            )
        if min(len(tokens), length) - len(given) >= 2:
            yield Answer(kind, prompt, tokens[:length], len(given), greedy)


def held_out(
    answers: Sequence[Answer], kinds: Sequence[str], share: int = HELD_OUT
) -> tuple[list[Answer], list[Answer]]:
    """Those to train on, and the others: all of those kinds, and of the rest every answer to one
    prompt in `share`, whichever these are."""
    unknown = [kind for kind in kinds if all(answer.kind != kind for answer in answers)]
    if unknown:
        known = sorted({answer.kind for answer in answers})
        raise TrainingError(
            f"--held-out {unknown[0]}: no prompt of that family: there are {', '.join(known)}"
        )
    prompts = {answer.prompt for answer in answers if answer.kind not in kinds}
    shuffled = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    chosen = {*shuffled[: -(-len(shuffled) // share)]}
    split: tuple[list[Answer], list[Answer]] = ([], [])
    for answer in answers:
        split[answer.kind in kinds or answer.prompt in chosen].append(answer)
    for part, what in zip(split, ("to train on", "to measure by"), strict=True):
        if not part:
            raise TrainingError(
                f"{len(answers)} answers, none of them {what}: give more prompts, or another "
                "--held-out"
            )
    return split


def measured_by(answers: Sequence[Answer], most: int) -> list[Answer]:
    """At most so many of the held-out answers, as many of each kind, the greedy ones where there
    are some; the longest first, so that like lengths share a batch."""
    greedy = [answer for answer in answers if answer.greedy] or [*answers]
    by_kind: dict[str, list[Answer]] = {}
    for answer in greedy:
        by_kind.setdefault(answer.kind, []).append(answer)
    each = max(1, most // len(by_kind))
    chosen = [
        answer
        for _, group in sorted(by_kind.items())
        for answer in Random(0).sample(group, min(each, len(group)))
    ]
    return sorted(chosen, key=lambda answer: (-len(answer.tokens), answer.prompt))


def write_prompts(file: Path, answers: Sequence[Answer]) -> None:
    """What they answer, a JSON object a line: family, prompt and its token ids."""
    lines = [
        json.dumps(
            {
                "family": answer.kind,
                "prompt": answer.prompt,
                "prompt_ids": answer.tokens[: answer.prompt_length].tolist(),
            }
        )
        for answer in answers
    ]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class LikeLengths(PackedTexts):
    """Answers one by one, those of like length beside each other. `training.examples.Data`."""

    def __init__(
        self, answers: Sequence[Answer], length: int, batch_size: int, side_by_side: int, seed: int
    ) -> None:
        super().__init__([answer.example for answer in answers], length, batch_size, seed)
        self._side_by_side = side_by_side  # sequences that share forwards, over all processes
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {side_by_side}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def tokens(self) -> int:
        """Of all answers and their prompts."""
        return sum(len(example.tokens) for example in self._examples)

    def _arranged(self, rng: Random) -> list[Documents]:
        # Whole groups, so that every one of the run begins where a forward's sequences do.
        size, n = self._side_by_side, len(self._examples)
        count = max(size, n - n % size)
        order = (rng.sample(self._examples, n) * -(-count // n))[:count]
        order.sort(key=lambda example: len(example.tokens))  # equal ones stay shuffled
        groups = [order[i : i + size] for i in range(0, count, size)]
        rng.shuffle(groups)
        return [[example] for group in groups for example in group]
