"""The demo model's text: its tokenizer, and the documents of every step.

Tasks and generated Python are drawn afresh for each step, so no document is met twice except those
of the standard library. A step's draw is a pure function of the seed and the step.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.demo.python_text import python_document
from training.demo.stdlib_text import stdlib_documents
from training.demo.tasks import VOCABULARY, draw_task
from training.examples import Example, Sequence, pack

LENGTH, BATCH_SIZE = 128, 16  # tokens of a sequence, sequences of a step
EOS, MASK = "<|endoftext|>", "<|mask|>"


class Mix(NamedTuple):
    """Shares of two kinds of documents, and the proportions of the rest, the tasks."""

    stdlib: float
    generated: float
    tasks: dict[str, float]


MIX = Mix(
    0.10,
    0.25,
    {
        "addition": 1.0,
        "copying": 1.0,
        "reversing": 1.5,
        "sorting": 1.5,
        "problems": 1.0,
        "records": 1.0,
    },
)
# When little is left to learn of some families, the others get their share.
LATE_MIX = Mix(
    0.05,
    0.20,
    {
        "addition": 2.0,
        "copying": 0.7,
        "reversing": 0.7,
        "sorting": 2.5,
        "problems": 3.0,
        "records": 1.0,
    },
)


def draw_document(rng: Random, stdlib: list[str], mix: Mix = MIX) -> tuple[str, str]:
    """A prompt (empty for plain text) and what follows it."""
    kind = rng.random()
    if kind < mix.stdlib:
        return "", rng.choice(stdlib)
    if kind < mix.stdlib + mix.generated:
        return "", python_document(rng)
    family = rng.choices(list(mix.tasks), list(mix.tasks.values()))[0]
    task = draw_task(family, rng, held_out=False)
    return task.prompt, task.answer


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting, EOS 0, mask 1. Digits never merge, so sums line up."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    apart = (re.sub(r"(?<=\d)(?=\d)", " ", text) for text in texts)
    tokenizer.train_from_iterator(apart, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}: add it to its special tokens")
    return int(found)


def demo_tokenizer(seed: int, vocab_size: int, documents: int = 30_000) -> Tokenizer:
    """Trained on documents as they are drawn, and on the tasks' words, each to be one token."""
    rng, stdlib = Random(f"{seed} tokenizer"), stdlib_documents()
    texts = ["".join(draw_document(rng, stdlib)) for _ in range(documents)]
    words = "".join(f" {word}\n{word}" for word in VOCABULARY)
    return train_tokenizer(texts + [words] * (documents // 20), vocab_size)


class DemoData:
    """What the trainer asks for: step -> sequences of at most LENGTH tokens.

    A step has BATCH_SIZE of them; of several replicas each takes its part. From step `late_from` on
    the documents are of the late mix.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        late_from: int,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self._tokenizer, self._seed, self._late_from = tokenizer, seed, late_from
        self._mine = slice(replica, None, replicas)
        self.settings = {
            "mix": MIX._asdict(),
            "late_mix": LATE_MIX._asdict(),
            "late_from": late_from,
        }
        self._eos = token_id(tokenizer, EOS)
        self._stdlib = [
            text for text in stdlib_documents() if len(self._example("", text).tokens) <= LENGTH
        ]
        digest = hashlib.sha256(tokenizer.to_str().encode())
        for step in range(100):
            documents = [(e.tokens, e.prompt_length) for s in self._sequences(step) for e in s]
            digest.update(repr(documents).encode())
        self.fingerprint = digest.hexdigest()

    def step(self, step: int) -> list[Sequence]:
        return self._sequences(step)[self._mine]

    def _sequences(self, step: int) -> list[Sequence]:
        """The fullest sequences of twice as many documents as they need."""
        rng = Random(f"{self._seed} step {step}")
        mix = LATE_MIX if step >= self._late_from else MIX
        packed = pack(self._documents(rng, mix), LENGTH, open_sequences=BATCH_SIZE)
        return list(islice(packed, BATCH_SIZE))

    def documents(self, step: int) -> list[str]:
        """The text of a step."""
        return [
            self._tokenizer.decode(list(example.tokens))
            for sequence in self.step(step)
            for example in sequence
        ]

    def _documents(self, rng: Random, mix: Mix) -> Iterator[Example]:
        while True:
            example = self._example(*draw_document(rng, self._stdlib, mix))
            if len(example.tokens) <= LENGTH:
                yield example

    def _example(self, prompt: str, answer: str) -> Example:
        """The two are encoded apart, as in decoding."""
        first = self._tokenizer.encode(prompt).ids
        return Example([*first, *self._tokenizer.encode(answer).ids, self._eos], len(first))
