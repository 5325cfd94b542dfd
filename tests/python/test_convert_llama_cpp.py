"""The file in llama.cpp: its logits and tokens against transformers' and sentencepiece's.

Needs llama-cpp-python, which is no dependency; skipped without it.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import family_models
from .checkpoints import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    SENTENCEPIECE,
    TEXTS,
    YARN_ROPE,
    convert_quietly,
    train_sentencepiece,
    write_checkpoint,
)

llama_cpp = pytest.importorskip("llama_cpp")
F32 = 0  # of the KV cache


def load(path: Path) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, type_k=F32, type_v=F32, verbose=False
    )


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"rope_parameters": YARN_ROPE}),
        ("llama", {"rope_parameters": YARN_ROPE | {"attention_factor": 0.8, "beta_fast": 8.0}}),
    ],
)
def test_logits_and_tokens(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_checkpoint(tmp_path / "model", model_type, **config)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 300, 100).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    # Rounding these small random weights to Q8_0 costs 0.04, and llama.cpp rounds activations too.
    for type_, tolerance in ("f32", 1e-5), ("q8_0", 0.1):
        convert_quietly(folder, tmp_path / "model.bin", type=type_)
        llama = load(tmp_path / "model.bin")
        llama.eval(ids)
        error = np.linalg.norm(llama.scores[: len(ids)] - expected) / np.linalg.norm(expected)
        assert error < tolerance, (type_, error)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        tokens = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokens == tokenizer(text)["input_ids"], text


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama", vocab_size=832, eos_token_id=2)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    processor = train_sentencepiece(folder, **SENTENCEPIECE["llama"])
    convert_quietly(folder, tmp_path / "model.bin")
    llama = load(tmp_path / "model.bin")
    for text in [*TEXTS, inspect.getsource(shutil)]:
        tokens = llama.tokenize(text.encode(), add_bos=True, special=False)
        assert tokens == [1, *processor.encode(text)], text


def test_nemotron_is_ministral_3(tmp_path: Path) -> None:
    """YaRN, and the growth of queries with their position, in llama.cpp's words."""
    model = family_models.NEMOTRON
    tensors = family_models.random_tensors(model)
    folder = family_models.write_family(tmp_path / "model", model, tensors)
    convert_quietly(folder, tmp_path / "model.bin", type="f32")
    ids = np.random.default_rng(0).integers(0, 300, 100).tolist()
    expected = family_models.family_logits(model, tensors, ids, family_models.visible(100, 0))
    llama = load(tmp_path / "model.bin")
    llama.eval(ids)
    error = np.linalg.norm(llama.scores[: len(ids)] - expected) / np.linalg.norm(expected)
    assert error < 1e-5


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_diffusion_models_see_all(name: str, tmp_path: Path) -> None:
    """llama.cpp has these architectures without a cache; its attention is in F16."""
    model = family_models.MODELS[name]
    tensors = family_models.random_tensors(model)
    folder = family_models.write_family(tmp_path / "model", model, tensors)
    convert_quietly(folder, tmp_path / "model.bin", type="f32")
    ids = np.random.default_rng(0).integers(0, 300, 100).tolist()
    n = len(ids)
    expected = family_models.family_logits(model, tensors, ids, family_models.visible(n, n))

    llama = load(tmp_path / "model.bin")
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama_cpp.llama_encode(llama.ctx, batch) == 0
    logits = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, i), (family_models.VOCAB,))
        for i in range(n)
    ]
    assert np.linalg.norm(np.array(logits) - expected) / np.linalg.norm(expected) < 0.01
    llama_cpp.llama_batch_free(batch)
