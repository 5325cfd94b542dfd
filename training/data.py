"""Training text: where documents come from, the tokenizer trained on them, packing into sequences.

Every batch is a pure function of (seed, step), so a resumed run reads what an unbroken one would.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from training.synthetic import exact_document, python_document

EOS, MASK = "<|endoftext|>", "<|mask|>"
SKIPPED_FOLDERS = {"test", "tests", "site-packages"}  # not the library, or not code to learn from:
SKIPPED_FOLDERS |= {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
MAX_CHARACTERS = 1200
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """Documents of one origin, and the share of drawn documents that come from it."""

    documents: list[str]
    share: float


def demo_sources(seed: int, generated: int = 30_000) -> list[Source]:
    """The demo's mix: the standard library, generated Python, generated exact tasks."""
    rng = Random(f"{seed} documents")
    return [
        Source(stdlib_documents(), 0.25),
        Source([python_document(rng) for _ in range(generated)], 0.65),
        Source([exact_document(rng) for _ in range(generated // 4)], 0.10),
    ]


def stdlib_documents() -> list[str]:
    """Short documents from this Python's own standard library (PSF licence), docstrings left out.

    `ast.unparse` gives all code one layout, which leaves a small model less to guess.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            try:
                module = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for text in _documents_of(module):
                if text.isascii() and len(text) <= MAX_CHARACTERS:
                    documents[text] = None
    return list(documents)


def _documents_of(module: ast.Module) -> Iterator[str]:
    """The module's beginning; every function and method; every class, shortened."""
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | _FUNCTION) and node.body:
            if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]  # a docstring is no code
    yield _shortened(module)
    for node in ast.walk(module):
        if isinstance(node, _FUNCTION):
            yield ast.unparse(node)
        elif isinstance(node, ast.ClassDef):
            yield _shortened(node)


def _shortened(node: ast.Module | ast.ClassDef) -> str:
    """`node` with as many leading statements as fit into MAX_CHARACTERS."""
    kept, size = 0, 0
    for statement in node.body:
        size += len(ast.unparse(statement))
        if size > MAX_CHARACTERS * 0.8:
            break
        kept += 1
    if kept == 0:
        return ""
    whole, node.body = node.body, node.body[:kept]
    text = ast.unparse(node)
    node.body = whole
    return text


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
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
    apart = (re.sub(r"(?<=\d)(?=\d)", " ", document) for document in documents)
    tokenizer.train_from_iterator(apart, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}: add it to its special tokens")
    return int(found)


class Corpus:
    """Tokenized documents, packed into sequences that each begin at the beginning of a document."""

    def __init__(self, sources: list[Source], tokenizer: Tokenizer, seed: int) -> None:
        eos = token_id(tokenizer, EOS)
        self._shares = [source.share for source in sources]
        self._documents: list[list[list[int]]] = [
            [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(source.documents)]
            for source in sources
        ]
        self._seed = seed
        digest = hashlib.sha256(repr(self._shares).encode())
        for source in sources:
            for document in source.documents:
                digest.update(document.encode() + b"\0")
        self.fingerprint = digest.hexdigest()

    def batch(self, step: int, batch_size: int, length: int) -> Tensor:
        """Documents drawn with replacement, each closed by EOS, the last one cut: int64 [B, L]."""
        rng = Random(f"{self._seed} batch {step}")
        return torch.tensor([self._sequence(rng, length) for _ in range(batch_size)])

    def _sequence(self, rng: Random, length: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += rng.choice(rng.choices(self._documents, self._shares)[0])
        return tokens[:length]
