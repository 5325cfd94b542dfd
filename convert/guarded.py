"""The `tokenizers` library behind a guard: it trusts a tokenizer, and that comes from anyone.

It panics, which no `except Exception` catches, and its steps may make any text of one letter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

from tokenizers import Tokenizer

from .charsmap import longest_replacement
from .spm_merges import check_nesting

Json = dict[str, Any]
T = TypeVar("T")

MOST_CHARACTERS = 1 << 27  # of a tokenizer.json: several times the largest
MOST_GROWTH = 256  # characters that all steps together may make of one
MOST_ADDED, MOST_ADDED_CHARACTERS = 1 << 17, 1 << 21
MOST_HOLES = 1 << 17  # ids without a token: the library lists them, and added tokens fill some
MOST_SURROUNDING = 256  # tokens that a post-processor may put around a text
# Characters that a step makes of one at most, where its type alone says it: Unicode's own worst.
GROWTH = {
    **dict.fromkeys(("NFKC", "NFKD"), 18),
    **dict.fromkeys(("NFC", "NFD", "BertNormalizer", "Lowercase"), 4),
    **dict.fromkeys(("ByteLevel",), 4),
    **dict.fromkeys(("Metaspace", "WordPiece"), 2),
}
INNER = ("normalizers", "pretokenizers", "decoders", "processors")


class GuardedTokenizer:
    """A library's tokenizer, each of whose methods raises `error`, in one line, and else nothing.

    `source` is what the tokenizer was made from, for that line.
    """

    def __init__(self, build: Callable[[], Tokenizer], source: str, error: type[Exception]) -> None:
        self._source, self._error = source, error
        self._inner = self._guarded("expected a tokenizer, got one that does not load", build)
        # Limits that training left in the file would cut or pad texts.
        self.no_truncation()
        self.no_padding()

    @classmethod
    def from_json(cls, text: str, source: str, error: type[Exception]) -> GuardedTokenizer:
        """Of a tokenizer.json that check_tokenizer lets through."""

        def build() -> Tokenizer:
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"{len(text)} characters: expected at most {MOST_CHARACTERS}")
            check_tokenizer(json.loads(text))
            return Tokenizer.from_str(text)

        return cls(build, source, error)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute
        what = f"the tokenizer fails to {name.replace('_', ' ')}"
        call = partial(self._guarded, what, attribute)
        setattr(self, name, call)  # and is found without this from now on: each token is decoded
        return call

    def set_post_processor(self, processor: Any) -> None:
        self._guarded(
            "expected a post_processor", setattr, self._inner, "post_processor", processor
        )

    def _guarded(self, what: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        try:
            return call(*arguments, **options)
        except BaseException as error:
            # A panic is no Exception, and its class cannot be imported.
            panic = type(error).__name__ == "PanicException"
            if isinstance(error, self._error) or not (panic or isinstance(error, Exception)):
                raise
            line = " ".join(str(error).split())
            raise self._error(f"{self._source}: {what}: {line}") from None


def check_tokenizer(tokenizer: Json) -> None:
    """Raises ValueError where a short text may become a long one, where loading or encoding would
    take time or memory out of all proportion to the file, and where the library would panic, which
    it also writes to standard error."""
    check_added(token["content"] for token in tokenizer.get("added_tokens") or [])
    model = tokenizer.get("model") or {}
    vocabulary = model.get("vocab") or []
    if model.get("type") == "WordPiece":
        check_nesting(vocabulary)
    elif model.get("type") == "Unigram" or isinstance(vocabulary, list):
        check_nesting(piece for piece, _ in vocabulary)
    if isinstance(vocabulary, dict):
        most = len(vocabulary) + MOST_HOLES
        if any(isinstance(id_, int) and id_ >= most for id_ in vocabulary.values()):
            raise ValueError(f"its vocabulary of {len(vocabulary)}: expected ids below {most}")
    if model.get("type") == "BPE":
        _check_merges(model)
    for key, parts in (
        ("normalizer", ("normalizer", "pre_tokenizer")),
        ("decoder", ("decoder",)),
    ):
        growth = 1.0
        for step in (step for part in parts for step in steps(tokenizer.get(part))):
            growth *= _growth(step)
            if growth > MOST_GROWTH:
                raise ValueError(f"its {key} may make more than {MOST_GROWTH} characters of one")
    surrounding = sum(_surrounding(step) for step in steps(tokenizer.get("post_processor")))
    if surrounding > MOST_SURROUNDING:
        raise ValueError(
            f"its post_processor puts {surrounding} tokens around a text: expected at most "
            f"{MOST_SURROUNDING}"
        )


def _check_merges(model: Json) -> None:
    """The library takes the prefix off a merge's second token, and puts both into a buffer as long
    as the longest token, without a look at either."""
    merges = model.get("merges") or []
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in merges if prefix else []:
        second = merge.rpartition(" ")[2] if isinstance(merge, str) else merge[1]
        if not second.startswith(prefix):
            raise ValueError(f"its merges: expected one behind {prefix!r}, got {second!r}")
    # Hundreds of thousands, so no loop: a pair is joined, a text stays what it is.
    written = max(map(len, map(str.encode, map("".join, merges))), default=0)
    between = len(prefix.encode()) + (bool(merges) and isinstance(merges[0], str))
    longest = max(map(len, map(str.encode, model.get("vocab") or [])), default=0)
    if written - between > longest:
        raise ValueError(f"its merges make tokens of {written - between} bytes, it has none")


def check_added(contents: Iterable[str]) -> None:
    """Added tokens are looked for in every text, all at once: a kilobyte of memory each."""
    lengths = [len(content) for content in contents]
    if len(lengths) > MOST_ADDED or sum(lengths) > MOST_ADDED_CHARACTERS:
        raise ValueError(
            f"expected at most {MOST_ADDED} added tokens of {MOST_ADDED_CHARACTERS} characters in "
            f"all, got {len(lengths)} of {sum(lengths)}"
        )


def steps(component: Json | None) -> Iterator[Json]:
    """A component's steps, taken out of its sequences."""
    waiting = [component]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        if part.get("type") == "Sequence":
            inner: list[Json] = next((part[key] for key in INNER if part.get(key)), [])
            waiting += reversed(inner)
        else:
            yield part


def _growth(step: Json) -> float:
    kind = step.get("type")
    if kind == "Replace":
        pattern, content = step.get("pattern", {}), str(step.get("content", ""))
        text = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(text, str) and text:
            return max(1.0, len(content) / len(text))
        return 1.0 + len(content)  # an expression may match the empty text before each character
    if kind == "Strip" and int(step.get("stop") or 0) > 1:  # the normalizer of this name has none
        raise ValueError(f"its decoder strips {step['stop']} characters from the end of any token")
    if kind == "FixedLength" and not step.get("length"):
        raise ValueError("its pre_tokenizer cuts a text into pieces of no length")
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")))
    if kind == "Precompiled":
        return longest_replacement(step.get("precompiled_charsmap"))
    return GROWTH.get(str(kind), 1.0)


def _surrounding(step: Json) -> int:
    ids = {
        name: len(token.get("ids", ()))
        for name, token in (step.get("special_tokens") or {}).items()
        if isinstance(token, dict)
    }
    pieces = [p["SpecialToken"]["id"] for p in step.get("single") or [] if "SpecialToken" in p]
    for name in pieces:
        if name not in ids:
            raise ValueError(f"its post_processor names a special token that it has not: {name!r}")
    return sum(ids[name] for name in pieces)
