"""Engine.score: against transformers' log-probabilities, and numpy's on
the raw logits of `forward`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python.command import PROMPT
from python.tiny_model import BOS, VOCAB_SIZE, byte_tokenizer, write_tiny_model
from reference.random_model import random_model, write_checkpoint

from sbd_engine import Engine, SbdError
from sbd_engine.convert import convert

BOS_ID = byte_tokenizer().token_to_id(BOS)


def log_softmax(logits: Any) -> Any:
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_log_probabilities_are_transformers(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = random_model(3, architecture, rope="default", tied=False)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    convert([checkpoint], tmp_path / "model.bin", type="f32", warn=lambda _: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = model.prompt(120)
    with torch.no_grad():
        rows = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        scores = engine.score(ids, top=5)
        assert engine.score(np.array(ids)).logprobs == scores.logprobs
    assert scores.tokens == ids
    assert (scores.logprobs[0], scores.ranks[0], scores.top[0]) == (None, None, [])
    given = rows[np.arange(len(rows)), ids[1:]]
    assert np.array(scores.logprobs[1:], float) == pytest.approx(given, abs=1e-4)
    for row, token, rank, best in zip(rows, ids[1:], scores.ranks[1:], scores.top[1:], strict=True):
        order = np.argsort(-row, kind="stable")
        assert order[rank] == token
        assert [each for each, _ in best] == order[:5].tolist()
        assert [logprob for _, logprob in best] == pytest.approx(row[order[:5]], abs=1e-4)


def test_long_texts_and_the_mask_token(model: Path) -> None:
    """In parts of rows that are no one's, as `forward`; a mask token counts like any other."""
    with Engine(model, kv_dtype="f32") as engine:
        mask = engine.model_config["mask_token_id"]
        ids = [(7 * i + i // 9) % 256 for i in range(511)] + [mask]
        rows = log_softmax(engine.forward(ids[:-1]))
        given = rows[np.arange(len(rows)), ids[1:]]
        assert np.array(engine.score(ids).logprobs[1:], float) == pytest.approx(given, abs=1e-5)
    with Engine(write_long(model), kv_dtype="f32") as long:
        ids = [(7 * i + i // 9) % 256 for i in range(1300)]
        rows = log_softmax(long.forward(ids[:-1]))
        given = rows[np.arange(len(rows)), ids[1:]]
        assert np.array(long.score(ids).logprobs[1:], float) == pytest.approx(given, abs=1e-5)


def write_long(model: Path) -> Path:
    folder = model.parent / "long"
    folder.mkdir(exist_ok=True)
    return write_tiny_model(folder, n_ctx=2048)


def test_text_begins_as_a_prompt_does(engine: Engine) -> None:
    scores = engine.score(PROMPT)
    assert scores.tokens == engine.tokenizer.encode(PROMPT)
    assert scores.tokens[0] == BOS_ID
    assert scores.top == [[]] * len(scores.tokens)


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ((PROMPT, -1), ValueError, "`top` >= 0, got -1"),
        ((PROMPT, 21), ValueError, "`top` <= 20, got 21"),
        ((PROMPT, 1.0), TypeError, "integer `top`, got 1.0"),
        (([5],), ValueError, "at least two token ids"),
        (("",), ValueError, "empty"),
        (([1, VOCAB_SIZE],), ValueError, f"got {VOCAB_SIZE} at position 1"),
        (([1] * 513,), ValueError, "within the context of 512, got 513: shorten it$"),
        ((b"bytes",), TypeError, "got bytes"),
    ],
)
def test_bad_input(engine: Engine, arguments: tuple[Any, ...], kind: type, complaint: str) -> None:
    with pytest.raises(kind, match=complaint) as caught:
        engine.score(*arguments)
    assert isinstance(caught.value, SbdError)
    assert "\n" not in str(caught.value)


def test_a_small_vocabulary_bounds_the_best(tmp_path: Path) -> None:
    import dataclasses

    whole = random_model(1, "llama", rope="default", tied=True)
    few = whole.tensors["model.embed_tokens.weight"][:12]
    config = {**whole.config, "vocab_size": 12, "mask_token_id": 11}
    config |= {"bos_token_id": 1, "eos_token_id": [2]}
    small = dataclasses.replace(
        whole, config=config, tensors={**whole.tensors, "model.embed_tokens.weight": few}
    )
    checkpoint = write_checkpoint(small, tmp_path / "checkpoint")
    convert([checkpoint], tmp_path / "model.bin", type="f32", warn=lambda _: None)
    with Engine(tmp_path / "model.bin") as engine:
        assert len(engine.score([3, 4], top=12).top[1]) == 12
        with pytest.raises(ValueError, match="`top` from 0 to the vocabulary of 12, got 13"):
            engine.score([3, 4], top=13)
        with pytest.raises(ValueError, match="`logprobs` of at most the vocabulary of 12, got 13"):
            engine.generate([3, 4], decoder="ntp", logprobs=13)
