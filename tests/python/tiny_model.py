"""A tiny model file of random weights with a byte-level tokenizer, by way of the converter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from reference.random_model import RandomModel, random_model, write_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sbd_engine.convert import convert

VOCAB_SIZE = 272  # 256 bytes, four words, the special tokens, and rows that no token has
WORDS = ["Ġthe", "Ċ", "ing", "ðŁĻĤ"]  # "\n" is a byte too: its name is in the alphabet already
BOS, EOS, MASK, SYSTEM = "<|bos|>", "<|eos|>", "<|mask|>", "<|system|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|system|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|system|>assistant\n{% endif %}"
)


def byte_tokenizer(add_bos: bool = True) -> Tokenizer:
    """One token per byte, and a few words that merges make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    tokens = list(alphabet)
    for word in WORDS:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1]
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, MASK, SYSTEM])
    if add_bos:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [bos])
    return tokenizer


def write_tiny_model(
    folder: Path,
    *,
    sbd: bool = True,
    chat: bool = True,
    n_ctx: int = 512,
    seed: int = 7,
    layers: int | None = None,
    settings: Sequence[str] = ("decoders=sbd,ntp",),
) -> Path:
    """A model file in `folder` that decodes as SBD, or as `settings` of its keys have it; without
    `sbd` it has no mask token and decodes as NTP."""
    tokenizer = byte_tokenizer()
    base = random_model(seed, "qwen3", rope="default", tied=True, layers=layers)
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal((VOCAB_SIZE, base.config["hidden_size"]))
    scale = 1 / np.sqrt(base.config["hidden_size"])
    tensors = base.tensors | {
        "model.embed_tokens.weight": (embedding * scale).astype(np.float32),
    }
    config = base.config | {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(EOS)],
        "mask_token_id": tokenizer.token_to_id(MASK),
        "max_position_embeddings": n_ctx,
    }
    checkpoint = write_checkpoint(RandomModel(config, tensors), folder / "checkpoint")
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}
    if sbd:
        special["mask_token"] = MASK
    else:
        del config["mask_token_id"]
        (checkpoint / "config.json").write_text(json.dumps(config))
    if chat:
        special["chat_template"] = CHAT_TEMPLATE
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(special))
    output = folder / "tiny.bin"
    block_size, keys = (16, [*settings]) if sbd else (None, [])
    convert(checkpoint, output, type="f32", block_size=block_size, settings=keys)
    return output


def with_template(
    folder: Path, template: str, tokens: Sequence[AddedToken] = (), n_ctx: int = 512
) -> Path:
    """The tiny model with another chat template, and up to four tokens more."""
    model = write_tiny_model(folder, n_ctx=n_ctx)
    path = model.parent / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*tokens])
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    tokenizer.save(str(model.parent / "checkpoint" / "tokenizer.json"))
    convert(model.parent / "checkpoint", model, type="f32")
    return model
