"""Byte-level BPE tokenizers that have no tokenizer.json: `vocab.json` and `merges.txt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .added_tokens import content
from .errors import ConvertError

VOCABULARY, MERGES = "vocab.json", "merges.txt"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Which pipeline a tokenizer_class has, and the special tokens it names where nobody does.
QWEN2, GPT2 = "Qwen2Tokenizer", "GPT2Tokenizer"
PIPELINES = {QWEN2: QWEN2, "DreamTokenizer": QWEN2, GPT2: GPT2}
END = "<|endoftext|>"
SPECIAL_TOKENS: dict[str, dict[str, Any]] = {
    QWEN2: dict.fromkeys(("unk_token", "eos_token", "pad_token"), END),
    GPT2: dict.fromkeys(("unk_token", "bos_token", "eos_token"), END),
}
QWEN2_MODELS = ("qwen2", "qwen3", "dream")  # GGUF's names


def pipeline_of(folder: Path, config: dict[str, Any], architecture: str) -> str:
    name = config.get("tokenizer_class")
    if name is None:
        return QWEN2 if architecture in QWEN2_MODELS else GPT2
    pipeline = PIPELINES.get(str(name).removesuffix("Fast"))
    if pipeline is None:
        raise ConvertError(
            f"{folder}: no tokenizer.json, and {VOCABULARY} is a {name}'s: expected one of "
            f"{', '.join(PIPELINES)}"
        )
    return pipeline


def byte_level_tokenizer(folder: Path, config: dict[str, Any], pipeline: str) -> Tokenizer:
    """Without the added tokens. Raises what the library raises."""
    model = models.BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES))
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    prefix = config.get("add_prefix_space") is True
    if pipeline == GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        return tokenizer
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS + REST), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    return tokenizer


def surrounding(tokenizer: Any, config: dict[str, Any]) -> processors.PostProcessor:
    """BOS before every text and EOS behind it, where tokenizer_config.json asks for them."""
    bos, eos = (
        content(config.get(f"{kind}_token")) if config.get(f"add_{kind}_token") is True else ""
        for kind in ("bos", "eos")
    )
    tokens = [token for token in (bos, eos) if token]
    return processors.TemplateProcessing(
        single=[*filter(None, (bos, "$A", eos))],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(tokens)],
    )
