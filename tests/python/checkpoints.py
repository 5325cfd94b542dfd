"""Tiny real checkpoints, written by transformers itself: weights, tokenizer and JSON files.

Norms are drawn away from 1 and biases away from 0, so that a missing operation shows; head_dim is
not hidden_size / heads; the embedding has more rows than the tokenizer has tokens.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VOCAB_SIZE = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
BOS, EOS, END_OF_TURN, MASK = "<|bos|>", "<|eos|>", "<|end|>", "<|mask|>"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12345, 678))\n",
    "Größe, naïve café, Ελληνικά, 中文字符, 🙂 and  two  spaces.",
    "  It's the reader's, they're here; we'll see the 1st of 2024.\r\n\t",
]


def random_model(model_type: str, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Any:
    """A transformers model in this shape, `config` changing it, every parameter drawn."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "mistral":
        config.setdefault("sliding_window", None)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**SHAPE, **config})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * values)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * values)
            else:
                parameter.copy_(values * 1.5 / parameter.shape[-1] ** 0.5)
    return model.to(getattr(torch, dtype)).eval()


def byte_level_tokenizer(words: str = QWEN2_WORDS, *, add_bos: bool = False) -> Any:
    """A byte-level BPE tokenizer of fewer than VOCAB_SIZE tokens, in transformers' class."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([BOS, EOS, END_OF_TURN, MASK])
    if add_bos:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def write_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    mask_token: str | None = MASK,
    add_bos: bool = False,
    max_shard_size: str = "5GB",
    seed: int = 0,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """Write a checkpoint into `folder` and return it; `config` as in config.json."""
    words = LLAMA3_WORDS if model_type in ("llama", "mistral") else QWEN2_WORDS
    tokenizer = byte_level_tokenizer(words, add_bos=add_bos)
    tokenizer.mask_token = mask_token
    ids = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": [tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, EOS)],
    }
    model = random_model(model_type, seed=seed, dtype=dtype, **{**ids, **config})
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "user_defined_symbols": ["<|mask|>"],
    },
    "bpe_defaults": {"model_type": "bpe", "byte_fallback": True},
    "no_prefix": {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
}


def train_sentencepiece(folder: Path, **options: Any) -> Any:
    """Write a tokenizer.model of 800 pieces, trained on real text, and return its processor."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(argparse).splitlines()),
        model_writer=model,
        vocab_size=800,
        minloglevel=2,
        **options,
    )
    folder.joinpath("tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def convert_quietly(*arguments: Any, **options: Any) -> None:
    from sbd_engine.convert import convert

    convert(*arguments, warn=lambda _: None, **options)


def refusal(*arguments: Any, **options: Any) -> str:
    """The one line of the ConvertError that converting so must raise."""
    import pytest

    from sbd_engine.convert import ConvertError

    with pytest.raises(ConvertError) as error:
        convert_quietly(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """A model file's metadata and dequantised tensors, with the gguf library's reader."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])
        for t in reader.tensors
    }
    return metadata, tensors


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def expected_tensors(state: dict[str, Any], interleaved: bool) -> dict[str, Array]:
    """A transformers state dict under GGUF's names, Q and K rows in GGUF's order."""
    tensors = {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        values = tensor.float().numpy()
        if module.startswith("model.layers."):
            _, _, layer, inner = module.split(".", 3)
            if interleaved and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                # Row 2j + c of a head is the original row c * head_dim/2 + j.
                values = np.stack([values[16 * c + j :: 32] for j in range(16) for c in (0, 1)], 1)
                values = values.reshape(tensor.shape)
            tensors[f"blk.{layer}.{NAMES[inner]}.{kind}"] = values
        else:
            tensors[f"{NAMES[module]}.{kind}"] = values
    return tensors


def state_of(stored: dict[str, Array], interleaved: bool, head_dim: int) -> dict[str, Array]:
    """The way back: GGUF's tensors under transformers' names."""
    names = {theirs: ours for ours, theirs in NAMES.items()}
    state = {}
    for name, values in stored.items():
        *layer, inner, kind = name.removeprefix("blk.").split(".")
        module = f"model.layers.{layer[0]}.{names[inner]}" if layer else names[inner]
        if interleaved and inner in ("attn_q", "attn_k"):
            # A head's rows are pairs (j, j + head_dim / 2), one after another.
            pairs = values.reshape(-1, head_dim // 2, 2, values.shape[-1])
            state[f"{module}.{kind}"] = pairs.swapaxes(1, 2).reshape(values.shape)
        else:
            state[f"{module}.{kind}"] = values
    return state
