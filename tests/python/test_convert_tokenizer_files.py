"""Every form a tokenizer's files have in a checkpoint, against transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sbd_engine.convert import ConvertError
from sbd_engine.convert.checkpoint import Checkpoint
from sbd_engine.convert.settings import end_tokens
from sbd_engine.convert.tokenizer import Tokenizer, load_tokenizer, tokenizer_metadata
from sbd_engine.ggml_tokenizer import tokenizer_from_ggml

from .checkpoints import (
    BOS,
    END_OF_TURN,
    EOS,
    MASK,
    SENTENCEPIECE,
    TEXTS,
    byte_level_tokenizer,
    edit_json,
    train_sentencepiece,
)

pytest.importorskip("transformers")  # whose ids all are compared with

TOKEN = "<x>"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
WITH_TOKEN = [f"a{TOKEN}b", f"{TOKEN}{TOKEN}", f" {TOKEN}  b", "<|endoftext|>a<|im_end|>\n"]


def opened(folder: Path, **config: Any) -> Checkpoint:
    values = {"model_type": "llama", "vocab_size": 400} | config
    return Checkpoint(folder, [], values, {})


def loaded(folder: Path, lines: list[str] | None = None, **config: Any) -> Tokenizer:
    lines = [] if lines is None else lines
    return load_tokenizer(opened(folder, **config), lines.append)


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def same_ids(folder: Path, tokenizer: Tokenizer, other: Any) -> None:
    """Of texts with and without added tokens; and the text comes back from a file's JSON."""
    from tokenizers import Tokenizer as Library

    ours = Library.from_str(tokenizer.json_text)
    for text in TEXTS + WITH_TOKEN:
        ids = other(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        special = dict(skip_special_tokens=True)
        assert ours.decode(ids, **special) == other.decode(ids, **special)


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """A tokenizer.json of 304 tokens, beside a configuration that names little."""
    byte_level_tokenizer().save_pretrained(tmp_path)
    names = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    return tmp_path


def slow(folder: Path, **config: Any) -> Path:
    """vocab.json and merges.txt, and the added tokens as Dream and Qwen2 have them."""
    model = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    names = ("<|endoftext|>", "<|im_end|>", "<|mask|>", TOKEN)
    added = {name: len(model["vocab"]) + i for i, name in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_slow_files(name: str, add_bos: bool, tmp_path: Path) -> None:
    slow(tmp_path, tokenizer_class=name, mask_token=MASK, additional_special_tokens=["<|im_end|>"])
    if add_bos:
        edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True, bos_token="<|im_end|>")
    tokenizer = loaded(tmp_path)
    same_ids(tmp_path, tokenizer, theirs(tmp_path))
    assert tokenizer.special_id("mask") == tokenizer.ids["<|endoftext|>"] + 2
    metadata = tokenizer_metadata(tokenizer, 400, lambda _: None)
    assert metadata["tokenizer.ggml.add_bos_token"] is add_bos
    assert metadata["tokenizer.ggml.pre"] == {"Q": "qwen2", "G": "gpt-2"}[name[0]]


def test_dream_is_qwen2(tmp_path: Path) -> None:
    """Its class is in the folder's own code; NFC and the pattern are Qwen2's."""
    slow(tmp_path, tokenizer_class="DreamTokenizer", mask_token=MASK)
    ours = loaded(tmp_path, model_type="Dream", architectures=["DreamModel"])
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    same_ids(tmp_path, ours, theirs(tmp_path))
    assert ours.hf.encode("e\u0301").ids == ours.hf.encode("\u00e9").ids
    # A folder that names no class is read as its architecture's.
    (tmp_path / "tokenizer_config.json").write_text("{}")
    unnamed = loaded(tmp_path, model_type="qwen3")
    assert unnamed.hf.encode("e\u0301").ids == ours.hf.encode("\u00e9").ids
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="OddTokenizer")
    with pytest.raises(ConvertError, match="OddTokenizer's: expected one of Qwen2Tokenizer"):
        loaded(tmp_path)


ENTRY = {"content": TOKEN, "special": True, **FLAGS}
BESIDE: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"added_tokens": {TOKEN: 304}},
    "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": {"304": ENTRY}}},
    "rstrip": {
        "tokenizer_config": {"added_tokens_decoder": {"304": ENTRY | {"rstrip": True}}},
    },
    "not special": {
        "tokenizer_config": {"added_tokens_decoder": {"304": ENTRY | {"special": False}}},
    },
    "other flags of a known token": {
        "tokenizer_config": {
            "added_tokens_decoder": {"302": ENTRY | {"content": END_OF_TURN, "lstrip": True}}
        },
    },
    "mask_token": {"tokenizer_config": {"mask_token": TOKEN}},
    "mask_token with flags": {
        "tokenizer_config": {"mask_token": {"__type": "AddedToken", **ENTRY}}
    },
    "image_token": {"tokenizer_config": {"image_token": TOKEN}},
    "additional_special_tokens": {"tokenizer_config": {"additional_special_tokens": [TOKEN]}},
    "extra_special_tokens": {"tokenizer_config": {"extra_special_tokens": ["<y>", TOKEN]}},
    "extra_special_tokens by name": {"tokenizer_config": {"extra_special_tokens": {"x": TOKEN}}},
    "special_tokens_map.json": {"special_tokens_map": {"mask_token": TOKEN}},
    "special_tokens_map.json with flags": {
        "special_tokens_map": {"mask_token": {"content": TOKEN, **FLAGS, "rstrip": True}}
    },
    "both files": {"added_tokens": {TOKEN: 304}, "special_tokens_map": {"mask_token": TOKEN}},
    "a word of the vocabulary": {"tokenizer_config": {"mask_token": "x"}},
}


@pytest.mark.parametrize("place", BESIDE)
def test_tokens_beside_tokenizer_json(place: str, fast: Path) -> None:
    for name, values in BESIDE[place].items():
        file = fast / f"{name}.json"
        if not file.exists():
            file.write_text("{}")
        edit_json(file, **values)
    same_ids(fast, loaded(fast), theirs(fast))


def test_an_id_that_the_tokenizer_cannot_give(fast: Path) -> None:
    (fast / "added_tokens.json").write_text(json.dumps({TOKEN: 306}))
    with pytest.raises(
        ConvertError, match="'<x>': expected the ids from 304 on without a gap, got"
    ):
        loaded(fast)
    (fast / "added_tokens.json").write_text(json.dumps({TOKEN: "no"}))
    with pytest.raises(ConvertError, match="'<x>': expected a text with an id"):
        loaded(fast)


def test_nothing_beside_it_leaves_tokenizer_json_as_it_is(fast: Path) -> None:
    assert loaded(fast).json_text == (fast / "tokenizer.json").read_text()


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_flags_of_tokens_beside_a_sentencepiece_model(kind: str, tmp_path: Path) -> None:
    processor = train_sentencepiece(tmp_path, **SENTENCEPIECE[kind])
    size = processor.get_piece_size()
    entry = ENTRY | {"rstrip": True, "normalized": True}
    config = {"added_tokens_decoder": {str(size): entry}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    hf = loaded(tmp_path, vocab_size=size + 1).hf
    for before, after in ("a", "b"), ("def", "return 1"):
        expected = [*processor.encode(before), size, *processor.encode(after)]
        assert hf.encode(f"{before}{TOKEN}  {after}").ids == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_truncation_do_not_hide_bos(side: str, tmp_path: Path) -> None:
    folder = tmp_path
    hf = byte_level_tokenizer(add_bos=True)
    hf.backend_tokenizer.enable_padding(direction=side, length=16, pad_id=301, pad_token=EOS)
    hf.backend_tokenizer.enable_truncation(1, direction=side)
    hf.backend_tokenizer.save(str(folder / "tokenizer.json"))
    metadata = tokenizer_metadata(loaded(folder), 400, lambda _: None)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.bos_token_id"] == 300
    assert metadata["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize("says", [None, False, True])
@pytest.mark.parametrize("does", [False, True])
def test_what_the_tokenizer_does_counts(says: bool | None, does: bool, tmp_path: Path) -> None:
    byte_level_tokenizer(add_bos=does).save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=says)
    lines: list[str] = []
    metadata = tokenizer_metadata(loaded(tmp_path), 400, lines.append)
    assert metadata["tokenizer.ggml.add_bos_token"] is does
    complaint = (
        f"tokenizer_config.json says add_bos_token {str(says).lower()}, but the tokenizer adds "
        f"{'one' if does else 'none'}: what it does counts"
    )
    assert lines == ([] if says in (None, does) else [complaint])


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "template", "expected"),
    [
        ([301], 301, END_OF_TURN, "", [301, 302]),
        (None, 301, END_OF_TURN, "", [301, 302]),
        (301, [302], EOS, "", [301, 302]),
        ([302, 301], 301, EOS, "", [302, 301]),
        (None, None, EOS, "", [301]),
        (None, 301, EOS, "{{ m }}<|end|>\n", [301, 302]),
        (None, 301, EOS, "{{ m }}<|im_end|>\n", [301]),  # the tokenizer has no such token
        (None, 301, EOS, "{{ m }}<|mask|>\n", [301]),  # which ends no turn
    ],
)
def test_every_end_that_a_file_names(
    generation: Any, config: Any, tokenizer: str, template: str, expected: list[int], fast: Path
) -> None:
    edit_json(fast / "tokenizer_config.json", eos_token=tokenizer, chat_template=template)
    if generation is not None:
        (fast / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    checkpoint = opened(fast, eos_token_id=config)
    values = end_tokens(checkpoint, load_tokenizer(checkpoint, print), print)
    assert values["sbd.eos_token_ids"] == expected
    assert values["tokenizer.ggml.eos_token_id"] == expected[0]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("cuts", "name"),
    [
        ([BYTES], "gpt-2"),
        ([DIGITS, BYTES], "smollm"),
        ([DIGITS | {"individual_digits": False}, BYTES], "default"),
        ([DIGITS, BYTES | {"add_prefix_space": True}], "default"),
    ],
)
def test_llama_cpp_s_name_of_how_text_is_cut(
    cuts: list[dict[str, Any]], name: str, fast: Path
) -> None:
    edit_json(fast / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": cuts})
    tokenizer, warnings = loaded(fast), []
    metadata = tokenizer_metadata(tokenizer, 304, warnings.append)
    assert metadata["tokenizer.ggml.pre"] == name
    assert (name == "default") == any("llama.cpp may split text" in each for each in warnings)
    if name != "default":
        text = "In 2024, 12 of 345 foxes;\n\n  * ran 6789 miles"
        ggml = tokenizer_from_ggml(metadata).encode(text, add_special_tokens=False)
        assert ggml.ids == tokenizer.hf.encode(text, add_special_tokens=False).ids
