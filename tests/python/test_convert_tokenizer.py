"""The tokenizer in the model file, against transformers and sentencepiece themselves."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sbd_engine.convert import convert

from .checkpoints import (
    MASK,
    SENTENCEPIECE,
    TEXTS,
    VOCAB_SIZE,
    convert_quietly,
    edit_json,
    read_model,
    train_sentencepiece,
    write_checkpoint,
)


def test_tokenizer_travels_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = write_checkpoint(tmp_path / "model", "qwen3", add_bos=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    convert_quietly(folder, tmp_path / "model.bin")
    metadata = read_model(tmp_path / "model.bin")[0]
    assert metadata["tokenizer.huggingface.json"] == (folder / "tokenizer.json").read_text()
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_str(metadata["tokenizer.huggingface.json"])
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB_SIZE
    assert tokens[:304] == theirs.convert_ids_to_tokens(range(304))
    assert tokens[303:305] == [MASK, "[PAD304]"]
    assert types[0] == 1 and types[303] == 3 and types[304] == 5
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    first = metadata["tokenizer.ggml.merges"][0]
    assert first == " ".join(json.loads(ours.to_str())["model"]["merges"][0])


def test_chat_templates_of_the_tokenizer_config(llama_copy: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    edit_json(llama_copy / "tokenizer_config.json", chat_template=templates)
    convert_quietly(llama_copy, tmp_path / "model.bin")
    metadata = read_model(tmp_path / "model.bin")[0]
    assert metadata["tokenizer.chat_template"] == "D"
    assert metadata["tokenizer.chat_template.tool_use"] == "T"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_only(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    folder = write_checkpoint(tmp_path / "model", "llama", vocab_size=832, eos_token_id=2)
    (folder / "tokenizer.json").unlink()
    added = {
        "801": {"content": "<|word|>", "special": False},
        "800": {"content": "<|extra|>", "special": True},
        "1": {"content": "<s>", "special": True},
    }
    config = {"added_tokens_decoder": added, "bos_token": "<s>", "mask_token": "<|extra|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = train_sentencepiece(folder, **SENTENCEPIECE[kind])
    warnings: list[str] = []
    convert(folder, tmp_path / "model.bin", warn=warnings.append)
    metadata = read_model(tmp_path / "model.bin")[0]
    tokenizer = Tokenizer.from_str(metadata["tokenizer.huggingface.json"])

    code = inspect.getsource(shutil)
    texts = [*TEXTS, *code.splitlines(), code, "", " ", "a", " a", "a ", "aaaa", "\n\n\n"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), repr(text)
        assert tokenizer.decode(ids) == processor.decode(ids), repr(text)
    assert tokenizer.encode("a").ids[0] == processor.bos_id() == 1
    assert tokenizer.encode("a<|extra|>").ids[-1] == metadata["sbd.mask_token_id"] == 800

    assert metadata["tokenizer.ggml.add_bos_token"] is True
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 4 if kind == "llama" else 6]
    assert types[800:803] == [3, 4, 5]
    assert tokenizer.decode([800, 801]) == "<|word|>"
    if kind == "unigram":
        assert metadata["tokenizer.ggml.model"] == "none" and "Unigram" in warnings[0]
        return
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (kind != "no_prefix")
    # The same order of joining as sentencepiece's own scores say.
    scores = np.array(metadata["tokenizer.ggml.scores"])[:800]
    joined = [i for i in range(800) if types[i] == 1 and len(processor.id_to_piece(i)) > 1]
    by_ours = sorted(joined, key=lambda i: -scores[i])
    assert by_ours == sorted(joined, key=lambda i: -processor.get_score(i))
