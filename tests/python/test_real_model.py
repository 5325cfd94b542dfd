"""A real model as its users have it, SmolLM2-135M-Instruct in Q4_1: it answers as it is, and its
weights give the engine what they give transformers.

Transformers gets the gguf library's values of the file in float32, and the publisher's tokenizer
from the file's vocabulary; that checkpoint is converted to F32 for the engine. So nothing but the
rounding of float32 is between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference.stats import log_softmax

from sbd_engine import Engine
from sbd_engine.cli import main

from .checkpoints import convert_quietly
from .real_model import write_checkpoint_of

pytestmark = pytest.mark.xdist_group("real model")  # one of it in memory

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CHATS = [
    [(USER, "What is the capital of Japan?")],
    [(USER, "What is 12 + 30, and what is 2048 / 16?")],
    [(USER, "Café, naïve, 中文, 🙂\n\n\tx = {'a': 1.5}  # two  spaces")],
    [(USER, "What is the capital of France?")],
    [(USER, "Write a Python function that adds two numbers.")],
    [(USER, "List the three primary colours.")],
    [(USER, "Translate 'good morning' into Spanish.")],
    [(SYSTEM, "You answer in one short sentence."), (USER, "Why is the sky blue?")],
    [(USER, "My name is Ada."), (ASSISTANT, "Hello Ada!"), (USER, "What is my name?")],
    [(USER, "Explain photosynthesis to a child.")],
]
CHAT_MESSAGES = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
TEXT = """\
The lighthouse at the end of the bay was built in 1871, when the harbour still took in more than 300
ships a year. Its keeper lived with his family in two small rooms below the lamp, and wrote down the
weather every morning and every evening in a book that the museum of the town keeps to this day. On
clear nights its light could be seen from a distance of twenty miles. When electricity arrived, the
keeper was no longer needed; the last one left in the spring of 1954.

    def area(width, height):
        return width * height
"""
NEW_TOKENS = 24
# Both are float32 over 30 layers of unlike sums; what stands nearer than this may fall either way.
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def engine(real_model: Path) -> Iterator[Engine]:
    with Engine(real_model) as engine:
        yield engine


class Twin(NamedTuple):
    """The file's weights in float32."""

    model: Any  # transformers'
    tokenizer: Any
    engine: Engine

    def logits(self, ids: list[int]) -> Any:
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def twin(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = tmp_path_factory.mktemp("real") / "checkpoint"
    tokenizer = write_checkpoint_of(real_model, checkpoint)
    folder = checkpoint.parent
    convert_quietly([checkpoint], folder / "f32.bin", type="f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with Engine(folder / "f32.bin", kv_dtype="f32") as engine:
        yield Twin(model.eval(), tokenizer, engine)


def test_answers_and_stops(
    real_model: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    done = engine.generate(engine.tokenizer.encode_chat(CHAT_MESSAGES[0]), max_tokens=40)
    assert done.text == "The capital of Japan is Tokyo."
    assert done.finish_reason == "stop"
    assert done.tokens[-1] == 2  # <|im_end|>
    prompt = CHATS[0][0][1]
    assert main.run(["run", str(real_model), "--chat", "-p", prompt, "--max-tokens", "40"]) == 0
    assert capsys.readouterr().out == done.text + "\n"


def test_ids_are_transformers(engine: Engine, twin: Twin) -> None:
    for messages in CHAT_MESSAGES:
        text = twin.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        expected = twin.tokenizer(text, add_special_tokens=False).input_ids
        for each in (engine, twin.engine):
            assert each.tokenizer.apply_chat_template(messages) == text
            assert each.tokenizer.encode_chat(messages) == expected
            assert each.tokenizer.decode(expected, skip_special_tokens=False) == text
    assert engine.tokenizer.encode(TEXT) == twin.tokenizer(TEXT).input_ids


class Rows(NamedTuple):
    ids: list[int]
    logits: Any  # transformers'


@pytest.fixture(scope="module")
def rows(twin: Twin) -> Rows:
    ids = twin.tokenizer(TEXT).input_ids
    return Rows(ids, twin.logits(ids))


def test_logits_in_f32(twin: Twin, rows: Rows) -> None:
    difference = np.abs(twin.engine.forward(rows.ids) - rows.logits)
    error = np.max(difference) / np.max(np.abs(rows.logits))
    print(f"largest relative error of {len(rows.ids)} rows: {error:.1e}")
    assert error < 1e-4


def test_scores_in_f32(twin: Twin, rows: Rows) -> None:
    exact = log_softmax(rows.logits)[:-1]
    scores = twin.engine.score(rows.ids, top=3)
    given = exact[np.arange(len(exact)), rows.ids[1:]]
    assert np.max(np.abs(np.array(scores.logprobs[1:], float) - given)) < 1e-4
    for row, best in zip(exact, scores.top[1:], strict=True):
        for token, logprob in best:
            assert abs(row[token] - logprob) < 1e-4
        assert best[0][1] >= row.max() - 1e-4


def test_greedy_texts_in_f32(twin: Twin) -> None:
    """Each new token is transformers' choice behind the same tokens, up to the first near tie."""
    prompts = [twin.engine.tokenizer.encode_chat(messages) for messages in CHAT_MESSAGES]
    options = {"max_tokens": NEW_TOKENS, "decoder": "ntp"}
    texts = twin.engine.generate_batch([{"prompt": p, **options} for p in prompts])
    for prompt, done in zip(prompts, texts, strict=True):
        rows = twin.logits(prompt + done.tokens[:-1])[len(prompt) - 1 :]
        chosen = rows[np.arange(len(rows)), done.tokens]
        margins = rows.max(axis=-1) - chosen  # 0 where the engine's token is theirs
        parted = np.flatnonzero(margins)
        said = f"token {parted[0]}, margin {margins[parted[0]]:.1e}" if len(parted) else "none"
        print(f"{done.text!r}\n  {len(rows)} tokens, parted at: {said}")
        assert len(parted) == 0 or margins[parted[0]] < NEAR_TIE


def loss(logits: Any, ids: list[int]) -> float:
    """Of each token behind those before it, in nats."""
    exact = log_softmax(logits)[:-1]
    return float(-np.mean(exact[np.arange(len(exact)), ids[1:]]))


def test_q4_1_is_near_its_own_values(engine: Engine, rows: Rows) -> None:
    """The file runs on activations rounded to 8 bits: its perplexity stays, and nearly all of its
    choices."""
    actual = engine.forward(rows.ids)
    losses = loss(actual, rows.ids), loss(rows.logits, rows.ids)
    same = np.mean(actual.argmax(-1) == rows.logits.argmax(-1))
    print(f"perplexity {np.exp(losses[0]):.2f}, in float32 {np.exp(losses[1]):.2f}")
    print(f"same choice in {same:.1%} of {len(rows.ids)} rows")
    assert abs(losses[0] - losses[1]) < 0.02
    assert same > 0.9
