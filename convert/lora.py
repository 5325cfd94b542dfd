"""A LoRA adapter in PEFT's layout, merged into the weights: W + scale * B A."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import StoredTensor, read_json, read_tensors
from .errors import ConvertError, listed

PREFIX = "base_model.model."
# "model.layers.0.mlp.up_proj" + ".lora_A.weight"; an embedding's pair has no ".weight".
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
# These begin by changing the base weights, so the adapter fits no checkpoint as published.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


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


def load_lora(folder: Path, base: dict[str, tuple[int, ...]]) -> LoraAdapter:
    """Read an adapter for weights of these shapes; a tensor of it that fits none is an error."""
    weights = folder / "adapter_model.safetensors"
    for path in (folder / "adapter_config.json", weights):
        if not path.is_file():
            raise ConvertError(f"LoRA adapter: {path} is missing: expected a PEFT adapter's folder")
    config = read_json(folder / "adapter_config.json")
    _check_config(config)
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
    return LoraAdapter(changes, replacements)


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise ConvertError(f"LoRA adapter: peft_type: expected 'LORA', got {config['peft_type']!r}")
    if config.get("use_dora"):
        raise ConvertError("LoRA adapter: a DoRA adapter cannot be merged: expected plain LoRA")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(CHANGED_BASE):
        raise ConvertError(
            f"LoRA adapter: init_lora_weights {init!r} changed the base weights: save the adapter "
            "as plain LoRA"
        )


def _low_rank(
    module: str, pair: dict[str, StoredTensor], config: dict[str, Any], shape: tuple[int, ...]
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
    alpha = _for_module(module, config.get("alpha_pattern"), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConvertError(f"LoRA adapter: lora_alpha: expected a number, got {alpha!r}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(left * np.float32(scale), right)


def _for_module(module: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _whole(tensor: StoredTensor) -> NDArray[np.float32]:
    if len(tensor.shape) != 2:
        raise ConvertError(
            f"LoRA adapter: {tensor.name}: expected a matrix, got {list(tensor.shape)}"
        )
    return tensor.rows(0, tensor.shape[0])
