"""What checks constrained texts and knows no constraint of the engine: validators, matchers by
tokens, and next-token decoding without a cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from python.tiny_model import EOS, MASK, VOCAB_SIZE, byte_tokenizer
from reference.sampling import Sampling, draw

from sbd_engine import Completion, Engine

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
lark = pytest.importorskip("lark")

EOS_ID, MASK_ID = (byte_tokenizer().token_to_id(token) for token in (EOS, MASK))
FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("time")  # RFC 3339's, which the package leaves to others
def is_time(text: object) -> bool:
    return re.fullmatch(r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)", str(text)) is not None


def check_valid(text: str, constraint: dict[str, Any]) -> None:
    """By someone who knows nothing of llguidance."""
    ((kind, source),) = constraint.items()
    if kind == "json_schema":
        wanted = json.loads(source) if isinstance(source, str) else source
        jsonschema.Draft202012Validator(wanted, format_checker=FORMATS).validate(json.loads(text))
    elif kind == "regex":
        assert re.fullmatch(source, text), (source, text)
    elif kind == "choices":
        assert text in source
    else:
        lark.Lark(source, parser="earley", regex=False).parse(text)


class Spelt:
    """Choices by their tokens, as a matcher has them."""

    def __init__(self, engine: Engine, choices: list[str]) -> None:
        self._engine = engine
        self._texts = [engine.tokenizer.encode(each, add_bos=False) for each in choices]
        self._text: list[int] = []

    def _left(self) -> list[list[int]]:
        n = len(self._text)
        return [text[n:] for text in self._texts if text[:n] == self._text]

    def consume_token(self, token: int) -> bool:
        return self.consume_tokens([token])

    def consume_tokens(self, tokens: list[int]) -> bool:
        self._text += tokens
        return bool(self._left())

    def compute_ff_tokens(self) -> list[int]:
        columns = zip(*self._left(), strict=False)  # as long as the shortest
        return [column[0] for column in takewhile(lambda each: len({*each}) == 1, columns)]

    def compute_bitmask(self) -> bytes:
        allowed = np.zeros(VOCAB_SIZE, np.uint8)
        allowed[[text[0] if text else EOS_ID for text in self._left()]] = 1
        return np.packbits(allowed, bitorder="little").tobytes()

    def is_error(self) -> bool:
        return False


def check_begins(engine: Engine, done: Completion, call: dict[str, Any]) -> None:
    """Tokens that a matcher of the test's own takes, one by one."""
    matcher = matcher_of(engine, {k: v for k, v in call.items() if k in KINDS})
    assert matcher.consume_tokens(done.tokens)


KINDS = ("json_schema", "regex", "grammar", "choices")


def matcher_of(engine: Engine, constraint: dict[str, Any]) -> Any:
    ((kind, source),) = constraint.items()
    if kind == "choices":
        return Spelt(engine, source)
    tokenizer = llguidance.LLTokenizer(
        engine.tokenizer.backend.to_str(),
        n_vocab=engine.model_config["vocab_size"],
        eos_token=engine.tokenizer.eos_token_ids[0],
    )
    make = llguidance.LLMatcher
    if kind == "json_schema":
        source = json.loads(source) if isinstance(source, str) else source
        grammar = make.grammar_from_json_schema(source, overrides={"whitespace_flexible": False})
    elif kind == "grammar":
        grammar = source
    else:
        grammar = make.grammar_from_regex(source)
    matcher = make(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def constrained_ntp(
    engine: Engine,
    ids: list[int],
    constraint: dict[str, Any],
    max_tokens: int,
    sampling: Sampling,
    last_logits: Callable[[list[int]], Any] | None = None,
) -> tuple[list[int], list[float], str]:
    """Uncached: every token by a forward of its own over all before it, but those that the grammar
    forces. Tokens, the margin of each, and why they end."""
    last_logits = last_logits or (lambda tokens: engine.forward(tokens)[-1])
    matcher = matcher_of(engine, constraint)
    text: list[int] = []
    margins: list[float] = []
    while len(text) < max_tokens:
        forced = matcher.compute_ff_tokens()[: max_tokens - len(text)]
        if forced:
            assert matcher.consume_tokens(forced)
            text += forced
            margins += [np.inf] * len(forced)
            continue
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        assert not matcher.is_error()
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if [*allowed] == [EOS_ID]:
            return text, margins, "stop"
        logits = np.full(VOCAB_SIZE, -np.inf)
        row = last_logits([*ids, *text]).astype(np.float64)
        logits[allowed] = row[allowed]
        logits[MASK_ID] = -np.inf
        if np.isfinite(logits).sum() == 1:
            token, margin = int(logits.argmax()), np.inf
        else:
            token, margin = draw(logits, sampling, len(ids) + len(text))
        text.append(token)
        margins.append(margin)
        if token == EOS_ID:
            return text, margins, "stop"
        assert matcher.consume_token(token)
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    only_end = [*allowed] == [EOS_ID] and not matcher.compute_ff_tokens()
    return text, margins, "stop" if only_end else "length"
