"""A request comes from anyone: whatever is in it, its errors are one short line, and others meet
none of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from sbd_engine import Engine, SbdError, SbdTypeError, SbdValueError

from .hostile import python

LONG = "\x1b[2J\n\u202e" + "a" * 3_000_000
DIGITS = 10**5000  # Python writes no such number


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(n_ctx=128, n_threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    "options",
    [
        *({name: LONG} for name in ("decoder", "unmask", "proxy", "temperature", "stop", "gamma")),
        *({name: [DIGITS]} for name in ("max_tokens", "temperature", "stop", "seed", "ignore_eos")),
        *({name: DIGITS} for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")),
        *({"prompt": prompt} for prompt in (LONG, [DIGITS], [LONG], [[[]] * 10**6], [-DIGITS])),
        {"logit_bias": {LONG: 1}},
        {"logit_bias": {DIGITS: 1}},
        {"logit_bias": dict.fromkeys(range(1 << 18), 1.0)},
        {LONG: 1},
        {"stop": ["a"] * 10**6},
        {"unmask": "\udcff"},
    ],
)
def test_an_error_is_one_short_line(engine: Engine, options: dict[str, Any]) -> None:
    began = time.process_time()
    with pytest.raises(SbdError) as error:
        engine.generate(**({"prompt": "a"} | options))
    assert time.process_time() - began < 1
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 1000
    assert engine._core.n_sequences == 0


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": LONG, "content": DIGITS}],
        [LONG],
        [{LONG: "a", 1: 2}],
        [{"content": b"a" * 10**6}],
        [{"content": "a" * (16 << 20)}],
    ],
)
def test_so_it_is_of_a_conversation(engine: Engine, messages: Any) -> None:
    with pytest.raises(SbdError) as error:
        engine.tokenizer.encode_chat(messages, chat_template="{{ messages }}")
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 1000


def test_a_conversation_far_beyond_the_context(engine: Engine) -> None:
    for text in "ab " * 1_000_000, "<|endoftext|>" * 100_000:
        began = time.process_time()
        with pytest.raises(SbdValueError, match="of at most 128 tokens, got one of"):
            engine.tokenizer.encode_chat(
                [{"role": "user", "content": text}],
                chat_template="{{ messages[0].content }}",
                fits=128,
            )
        assert time.process_time() - began < 2


def test_prompts_of_100_mb() -> None:
    done = python(
        "from sbd_engine import Engine, SbdError\n"
        "e = Engine(n_threads=1)\n"
        "for prompt in 'a ' * (50 << 20), 'é' * (50 << 20):\n"
        "    try: e.generate(prompt)\n"
        "    except SbdError as error: print(len(str(error)) < 1000)\n"
        "print(len(e.generate('a', max_tokens=2).tokens))"
    )
    assert (done.code, done.output) == (0, "True\nTrue\n2\n")
    assert done.seconds < 4  # most of which Python takes to start
    assert done.mib < 600


def test_limits_of_every_number(engine: Engine) -> None:
    """Extreme values that are allowed give a text."""
    vocabulary = engine.model_config["vocab_size"]
    plain = engine.generate("def", max_tokens=5).tokens
    for options in (
        dict(max_tokens=2**31 - 1, stop="e"),
        dict(temperature=1e30),
        dict(temperature=1e-30, top_p=1e-30),
        dict(temperature=1.0, top_k=2**31 - 1, min_p=1.0),
        dict(seed=2**64 - 1, sample_index=2**64 - 1, temperature=1.0),
        dict(logit_bias=dict.fromkeys(range(vocabulary), 3.3e38)),
        dict(repetition_penalty=1e30, presence_penalty=-2.0, frequency_penalty=2.0),
        dict(decoder="sbd", gamma=float("inf"), block_size=64),
    ):
        began = time.process_time()
        try:
            assert engine.generate("def", **({"max_tokens": 5} | options)).tokens
        except SbdValueError as error:  # logits beyond float32 are said to be so
            assert "NaN or infinite" in str(error)
        assert time.process_time() - began < 2
    assert engine.generate("def", max_tokens=5).tokens == plain


def test_types_are_type_errors(engine: Engine) -> None:
    with pytest.raises(SbdTypeError, match=r"got a list|got \[a list\]|got \["):
        engine.generate("a", max_tokens=[DIGITS])  # type: ignore[arg-type]
