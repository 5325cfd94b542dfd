"""A model file as a transformers model: GGUF's keys as its configuration, its tensors dequantised.

Every format that the `gguf` package dequantises is read, K-quants among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoConfig

from convert.architectures import TensorSpec, split_rotary, tensor_specs
from convert.fingerprint import fingerprint
from training.checkpoint import MODELS, renew_rotary
from training.errors import TrainingError

MODEL_TYPES = {"llama": "llama", "mistral3": "ministral3", "qwen2": "qwen2", "qwen3": "qwen3"}
DIVISORS = "rope_freqs.weight"
BIASED = "blk.0.attn_q.bias"


@dataclass(frozen=True)
class ModelFile:
    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Any]  # as GGUFReader has them
    config: dict[str, Any]  # as in a config.json
    fingerprint: str

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    @property
    def context(self) -> int:
        """Positions that full attention is the model's own for."""
        window = self.keys.get(f"{self.architecture}.attention.sliding_window")
        whole = int(self.config["max_position_embeddings"])
        return min(whole, int(window)) if window else whole

    @property
    def mask_token_id(self) -> int | None:
        """Of a model that knows a mask; None of another."""
        mask = self.keys.get("sbd.mask_token_id")
        return None if mask is None else int(mask)

    @property
    def chats(self) -> bool:
        return "tokenizer.chat_template" in self.keys

    @property
    def specs(self) -> list[TensorSpec]:
        return tensor_specs(self.config, tied=self.config["tie_word_embeddings"])


def open_model_file(path: Path) -> ModelFile:
    if not path.is_file():
        raise TrainingError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
        # The tokenizer's lists are long, and not needed.
        fields = {n: f for n, f in reader.fields.items() if not n.startswith("tokenizer.ggml.")}
        keys = {name: field.contents() for name, field in fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if keys.get("general.type", "model") != "model":
            raise TrainingError(f"{path}: is a file of {keys['general.type']}s, expected a model's")
        return ModelFile(path, keys, tensors, _config(path, keys, tensors), fingerprint(reader))
    except TrainingError:
        raise
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        line = " ".join(str(error).split())
        raise TrainingError(f"{path}: not a model file that can be read: {line}") from None


def _config(path: Path, keys: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    architecture = keys["general.architecture"]
    if architecture not in MODEL_TYPES:
        raise TrainingError(
            f"{path}: general.architecture is {architecture!r}, expected one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    if keys.get("sbd.prompt_attention", "causal") != "causal":
        raise TrainingError(
            f"{path}: reads its prompt in both directions: no next token could verify a draft"
        )

    def key(name: str, default: Any = None) -> Any:
        value = keys.get(f"{architecture}.{name}", default)
        if value is None:
            raise TrainingError(f"{path}: no {architecture}.{name} in it")
        return value

    heads, hidden = int(key("attention.head_count")), int(key("embedding_length"))
    return {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": int(key("feed_forward_length")),
        "num_hidden_layers": int(key("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key("attention.head_count_kv", heads)),
        "head_dim": int(key("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(key("context_length")),
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")),
        "attention_bias": architecture != "qwen2" and BIASED in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": float(key("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(path, architecture, keys),
    }


def _rope_scaling(path: Path, architecture: str, keys: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3's scaling is in a tensor, DIVISORS, instead."""
    rope = f"{architecture}.rope.scaling"
    kind, factor = keys.get(f"{rope}.type", "none"), float(keys.get(f"{rope}.factor", 1.0))
    scaling: dict[str, Any] = {}
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        grown = 0.1 * math.log(max(factor, 1.0)) + 1
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(keys[f"{rope}.original_context_length"]),
            "beta_fast": float(keys.get(f"{rope}.yarn_beta_fast", 32.0)),
            "beta_slow": float(keys.get(f"{rope}.yarn_beta_slow", 1.0)),
            "attention_factor": grown * float(keys.get(f"{rope}.attn_factor", 1.0)),
        }
    elif kind != "none":
        raise TrainingError(f"{path}: {rope}.type is {kind!r}, expected none, linear or yarn")
    beta = keys.get(f"{architecture}.attention.temperature_scale")
    if beta:
        scaling.setdefault("rope_type", "default")
        scaling["llama_4_scaling_beta"] = float(beta)
        length = f"{architecture}.attention.temperature_length"
        scaling["original_max_position_embeddings"] = int(keys[length])
    elif architecture == "mistral3":
        scaling.setdefault("rope_type", "default")
        scaling["llama_4_scaling_beta"] = 0.0  # transformers asks for one
        scaling.setdefault("original_max_position_embeddings", keys["mistral3.context_length"])
    return scaling or None


def load_model(file: ModelFile, attention: str, dtype: torch.dtype) -> Any:
    """A causal LM of transformers, frozen."""
    config = AutoConfig.for_model(**file.config)
    with torch.device("meta"):
        model = MODELS.from_config(config, dtype=dtype, attn_implementation=attention)
    renew_rotary(model)
    if DIVISORS in file.tensors:
        divisors = torch.from_numpy(file.tensors[DIVISORS].data.astype(np.float32))
        model.model.rotary_emb.inv_freq /= divisors
    state = dict(_state(file, dtype))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing:
        raise TrainingError(f"{file.path}: has no weight for {missing[0]}")
    model.requires_grad_(False)
    return model.eval()


def _state(file: ModelFile, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for spec in file.specs:
        tensor = file.tensors.get(spec.name)
        if tensor is None:
            raise TrainingError(f"{file.path}: no tensor {spec.name} in it")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != spec.shape:
            raise TrainingError(
                f"{file.path}: {spec.name} is {list(shape)}, expected {list(spec.shape)}"
            )
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError:
            raise TrainingError(
                f"{file.path}: {spec.name} is {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantise"
            ) from None
        if spec.rotary_head_dim:
            values = split_rotary(values, spec.rotary_head_dim)
        yield spec.source, torch.tensor(values).to(dtype)
