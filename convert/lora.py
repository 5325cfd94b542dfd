"""A LoRA adapter in PEFT's layout, merged into the weights: W + scale * B A."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .adapter_config import NAME, AdapterConfig, read_adapter_config
from .checkpoint import StoredTensor, file_of, read_json, read_tensors
from .errors import ConvertError, listed

PREFIX = "base_model.model."
# "model.layers.0.mlp.up_proj" + ".lora_A.weight"; an embedding's pair has no ".weight".
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")


@dataclass(frozen=True)
class LowRank:
    """The change to a weight: left @ right, `left` with the weight's rows."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.left[start:stop] @ self.right


@dataclass(frozen=True)
class LoraAdapter:
    changes: dict[str, LowRank]  # by the weight's name in the checkpoint
    replacements: dict[str, StoredTensor]  # PEFT's modules_to_save: whole weights
    ties_embeddings: bool = False  # what it does to one side of tied ones it does to both


def load_lora(folder: Path, base: dict[str, tuple[int, ...]]) -> LoraAdapter:
    """Read an adapter for weights of these shapes; a tensor of it that fits none is an error."""
    settings, weights = (file_of(folder, name) for name in (NAME, "adapter_model.safetensors"))
    for path in settings, weights:
        if not path.is_file():
            raise ConvertError(f"LoRA adapter: {path} is missing: expected a PEFT adapter's folder")
    config = read_adapter_config(read_json(settings))
    # A changed embedding is saved with the weight under it, which may be another than the base's.
    stored = {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in read_tensors([weights]).items()
    }

    replacements: dict[str, StoredTensor] = {}
    pairs: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in stored.items():
        match = PAIR.fullmatch(name)
        if match and f"{match['module']}.weight" in base:
            side = (match["embedding"] or "") + match["side"]
            pairs.setdefault(match["module"], {})[side] = tensor
        elif name in base:
            replacements[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ConvertError(
            f"LoRA adapter: {len(unknown)} tensors of the adapter fit no weight of the checkpoint: "
            f"{listed(unknown)}"
        )
    changes = {
        f"{module}.weight": _low_rank(module, pair, config, base[f"{module}.weight"])
        for module, pair in pairs.items()
    }
    return LoraAdapter(changes, replacements, config.ties_embeddings)


def _low_rank(
    module: str, pair: dict[str, StoredTensor], config: AdapterConfig, shape: tuple[int, ...]
) -> LowRank:
    if pair.keys() == {"A", "B"}:
        left, right = _whole(pair["B"]), _whole(pair["A"])
    elif pair.keys() == {"embedding_A", "embedding_B"}:
        left, right = _whole(pair["embedding_A"]).T, _whole(pair["embedding_B"]).T
    else:
        raise ConvertError(
            f"LoRA adapter: {module}: expected lora_A and lora_B, got {listed([*pair])}"
        )
    rank = right.shape[0]
    if not left.shape[1] == rank > 0 or (left.shape[0], right.shape[1]) != shape:
        raise ConvertError(
            f"LoRA adapter: {module}: the weight is {list(shape)}, the adapter's pair "
            f"{list(left.shape)} x {list(right.shape)}"
        )
    return LowRank(left * np.float32(config.scale(module, rank)), right)


def _whole(tensor: StoredTensor) -> NDArray[np.float32]:
    if len(tensor.shape) != 2:
        raise ConvertError(
            f"LoRA adapter: {tensor.name}: expected a matrix, got {list(tensor.shape)}"
        )
    return tensor.rows(0, tensor.shape[0])
