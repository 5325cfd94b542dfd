"""A user's files to examples: what is taught, what is cut, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from training.errors import TrainingError
from training.examples import Example
from training.texts import Encoder, PackedTexts, read_records

from .checkpoints import byte_level_tokenizer

MASK_ID = 303
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def encoder(length: int = 64, add_bos: bool = False) -> Encoder:
    tokenizer = byte_level_tokenizer(add_bos=add_bos)
    tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer, length, MASK_ID)


def taught(texts: Encoder, *records: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every example, as text."""
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    found = [e for record in read_records(path) for e in texts.examples(record)]
    decode = texts.tokenizer.decode
    return [
        (decode(e.tokens[: e.prompt_length]), decode(e.tokens[e.prompt_length :])) for e in found
    ]


def test_every_form(tmp_path: Path) -> None:
    conversation = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3"},
        {"role": "assistant", "content": "6"},
    ]
    before = "<|bos|>user\n2+2<|eos|>\n<|bos|>assistant\n"
    assert taught(
        encoder(),
        {"text": "some text"},
        {"prompt": "one ", "answer": "two"},
        {"messages": conversation},
        folder=tmp_path,
    ) == [
        ("", "some text<|eos|>"),
        ("one ", "two<|eos|>"),
        (before, "4<|eos|>"),
        (before + "4<|eos|>\n<|bos|>user\n3+3<|eos|>\n<|bos|>assistant\n", "6<|eos|>"),
    ]


def test_bos_is_given_not_written(tmp_path: Path) -> None:
    """Decoding starts behind it, so the first block does."""
    records = {"text": "some text"}, {"prompt": "one ", "answer": "two"}
    assert taught(encoder(add_bos=True), *records, folder=tmp_path) == [
        ("<|bos|>", "some text<|eos|>"),
        ("<|bos|>one ", "two<|eos|>"),
    ]


def test_what_is_too_long_is_cut(tmp_path: Path) -> None:
    texts = encoder(length=6, add_bos=True)
    records = (
        {"text": "01234567"},  # with BOS and EOS ten tokens
        {"prompt": "01", "answer": "234567"},
        {"prompt": "01234567", "answer": "8"},
    )
    assert taught(texts, *records, folder=tmp_path) == [
        ("<|bos|>", "01234"),
        ("", "567<|eos|>"),
        ("<|bos|>01", "234"),
    ]
    assert (texts.cut, texts.dropped) == (1, 1)


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("from b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.jsonl").write_text('{"text": "from c"}')
    (tmp_path / "notes.md").write_text("not data")
    assert [r.value["text"] for r in read_records(tmp_path)] == ["from c", "from b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", b"{", "d.jsonl:1: not JSON: "),
        (
            "d.jsonl",
            b'\n{"txt": "a"}',
            "d.jsonl:2: expected text, or prompt and answer, or messages; got the keys txt",
        ),
        ("d.jsonl", b'{"prompt": "a"}', "got the keys prompt"),
        ("d.jsonl", b"[]", "got no object"),
        ("d.jsonl", b'{"text": 5}', "text is 5, expected a string"),
        (
            "d.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "expected messages with a role and a content",
        ),
        (
            "d.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "no message of an assistant",
        ),
        ("d.txt", b"\xff", "d.txt: not UTF-8 at byte 0"),
        ("d.csv", b"", "d.csv: expected a .txt or .jsonl file"),
        ("d.txt", b"a <|mask|> b", "d.txt: holds the mask token (id 303)"),
    ],
)
def test_bad_data_is_one_line(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TrainingError) as error:
        for record in read_records(path):
            list(encoder().examples(record))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no such file or folder"):
        list(read_records(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match="no .txt or .jsonl file in this folder"):
        list(read_records(tmp_path))


def test_a_template_that_takes_words_back(tmp_path: Path) -> None:
    texts = encoder()
    texts.tokenizer.chat_template = "{{ messages | length }}"
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    with pytest.raises(TrainingError, match="the chat template does not continue"):
        taught(texts, {"messages": messages}, folder=tmp_path)
    texts.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(TrainingError, match="the chat template says: no such role"):
        taught(texts, {"messages": messages}, folder=tmp_path)


def test_epochs_hold_every_example_once_in_another_order() -> None:
    examples = [Example([i] * (5 + i % 7)) for i in range(100)]
    texts = PackedTexts(examples, 32, batch_size=3, seed=0)
    sizes = [texts.sequences_in_epoch(epoch) for epoch in range(3)]
    steps = [texts.step(step) for step in range(sum(sizes) // 3)]
    sequences = [sequence for step in steps for sequence in step]
    first, second = sequences[: sizes[0]], sequences[sizes[0] : sum(sizes[:2])]
    for epoch in first, second:
        assert sorted(e.tokens[0] for s in epoch for e in s) == list(range(100))
    assert first != second

    # A pure function of the step: asked for late or again, by this object or another.
    again = PackedTexts(examples, 32, batch_size=3, seed=0)
    assert again.step(len(steps) - 1) == steps[-1]
    assert texts.step(2) == steps[2]
    assert again.fingerprint == texts.fingerprint
    assert PackedTexts(examples[1:], 32, 3, 0).fingerprint != texts.fingerprint
