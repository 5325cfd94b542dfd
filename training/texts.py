"""A user's own text: .txt and .jsonl files to examples, examples to the batches of a run.

A .txt file is one document. A line of a .jsonl file is one of
    {"text": ...}                      plain text, all of it taught
    {"prompt": ..., "answer": ...}     the answer taught
    {"messages": [{"role": ..., "content": ...}, ...]}    each assistant's turn taught, after the
                                       conversation before it in the tokenizer's chat template
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from training.errors import TrainingError
from training.examples import Example, Sequence, pack

SUFFIXES = (".txt", ".jsonl")
FORMS = {frozenset({"text"}), frozenset({"prompt", "answer"}), frozenset({"messages"})}


@dataclass(frozen=True)
class Record:
    """One document's source, and where it stands."""

    place: str
    value: dict[str, Any]


def read_records(path: Path) -> Iterator[Record]:
    """The documents of a file, or of a folder's files in the order of their names."""
    for file in files_in(path, SUFFIXES):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TrainingError(f"{file}: not UTF-8 at byte {error.start}") from None
        if file.suffix == ".txt":
            yield Record(str(file), {"text": text})
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _parse(f"{file}:{number}", line)


def files_in(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or a folder's files with these suffixes, in the order of their names."""
    if not path.exists():
        raise TrainingError(f"{path}: no such file or folder")
    kinds = " or ".join(suffixes)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
        if not files:
            raise TrainingError(f"{path}: no {kinds} file in this folder")
        return files
    if path.suffix not in suffixes:
        raise TrainingError(f"{path}: expected a {kinds} file, or a folder of these")
    return [path]


def _parse(place: str, line: str) -> Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainingError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    keys = frozenset(value) if isinstance(value, dict) else None
    if keys not in FORMS:
        got = f"the keys {', '.join(sorted(keys)) or 'none'}" if keys is not None else "no object"
        raise TrainingError(f"{place}: expected text, or prompt and answer, or messages; got {got}")
    for key, content in value.items():
        if key != "messages" and not isinstance(content, str):
            raise TrainingError(f"{place}: {key} is {content!r}, expected a string")
    if "messages" in value:
        _check_messages(place, value["messages"])
    return Record(place, value)


def _check_messages(place: str, messages: Any) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        raise TrainingError(f"{place}: expected messages with a role and a content, both strings")
    if all(message["role"] != "assistant" for message in messages):
        raise TrainingError(f"{place}: no message of an assistant, so nothing to teach")


class Encoder:
    """Records to examples of at most `length` tokens. Counts what had to be left out."""

    def __init__(self, tokenizer: Any, length: int, mask_token_id: int) -> None:
        self.tokenizer, self.length, self.mask_token_id = tokenizer, length, mask_token_id
        self.cut = self.dropped = 0

    def examples(self, record: Record) -> Iterator[Example]:
        for prompt, answer in self._parts(record):
            tokens = np.array([*prompt, *answer], dtype=np.int32)
            if (tokens == self.mask_token_id).any():
                raise TrainingError(
                    f"{record.place}: holds the mask token (id {self.mask_token_id}): "
                    "take it out of the text, or choose another with --mask-token"
                )
            starts = range(0, len(tokens), self.length) if "text" in record.value else [0]
            found = []
            for i in starts:  # plain text in pieces, each from position 0 on; an answer is cut
                end = min(i + self.length, len(tokens))
                given = len(prompt) if i == 0 else 0
                found.append(Example(tokens[i:end], given, ends=end == len(tokens)))
            self.cut += len(prompt) < self.length < len(tokens) and "text" not in record.value
            kept = [example for example in found if example.labels > 0]
            self.dropped += not kept
            yield from kept

    def _parts(self, record: Record) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens that decoding would be given, and those that it should write, EOS included."""
        value, eos = record.value, self.tokenizer.eos_token_id
        if "messages" in value:
            yield from self._turns(record)
            return
        prompt = self._encode(value.get("prompt", ""), special=True)
        if prompt[-1:] == [eos]:  # some tokenizers close every text
            prompt = prompt[:-1]
        answer = self._encode(value["text" if "text" in value else "answer"], special=False)
        yield prompt, [*answer, eos]

    def _turns(self, record: Record) -> Iterator[tuple[list[int], list[int]]]:
        messages = record.value["messages"]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(record, messages[:i], add_generation_prompt=True)
            after = self._template(record, messages[: i + 1], add_generation_prompt=False)
            if not after.startswith(before):
                raise TrainingError(
                    f"{record.place}: the chat template does not continue the conversation "
                    f"where message {i + 1} begins: give prompt and answer instead"
                )
            answer = self._encode(after[len(before) :].rstrip(), special=False)
            if answer[-1:] != [self.tokenizer.eos_token_id]:
                answer.append(self.tokenizer.eos_token_id)
            yield self._encode(before, special=False), answer

    def _template(self, record: Record, messages: list[Any], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # of the template's own, whatever it raises
            raise TrainingError(f"{record.place}: the chat template says: {error}") from None

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


class PackedTexts:
    """Examples, shuffled and packed anew for every epoch. `training.examples.Data`."""

    def __init__(self, examples: list[Example], length: int, batch_size: int, seed: int) -> None:
        self._examples, self._length = examples, length
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._sequences = -1, list[Sequence]()
        self._first = [0]  # of each epoch begun: the number of its first sequence
        digest = hashlib.sha256(str((length, batch_size)).encode())
        for example in examples:
            digest.update(example.prompt_length.to_bytes(4, "little"))
            digest.update(np.asarray(example.tokens, dtype=np.int32).tobytes() + b"\xff" * 4)
        self.fingerprint = digest.hexdigest()

    def step(self, step: int) -> list[Sequence]:
        first = step * self._batch_size
        return [self._sequence(i) for i in range(first, first + self._batch_size)]

    def sequences_in_epoch(self, epoch: int) -> int:
        """Epochs differ by a few: each packs its own order."""
        self._open(epoch)
        return len(self._sequences)

    def _sequence(self, number: int) -> Sequence:
        epoch = max(self._epoch, 0)
        while number < self._first[epoch]:
            epoch -= 1
        while True:
            self._open(epoch)
            if number < self._first[epoch] + len(self._sequences):
                return self._sequences[number - self._first[epoch]]
            epoch += 1

    def _open(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        sequences = self._arranged(Random(f"{self._seed} epoch {epoch}"))
        self._epoch, self._sequences = epoch, sequences
        if len(self._first) == epoch + 1:
            self._first.append(self._first[epoch] + len(sequences))

    def _arranged(self, rng: Random) -> list[Sequence]:
        """An epoch's sequences in their order."""
        sequences = list(pack(rng.sample(self._examples, len(self._examples)), self._length))
        rng.shuffle(sequences)  # the fullest are not the first
        return sequences
