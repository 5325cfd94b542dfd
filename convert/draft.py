"""A LoRA adapter that only drafts, in a file of its own: GGUF's layout of adapters.

Merged, it would change the model that verifies; in the model's file, llama.cpp would refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as WeightType
from numpy.typing import NDArray

from .architectures import TensorSpec, interleave_rotary
from .errors import ConvertError, listed
from .lora import LoraAdapter
from .quantize import encode
from .values import Value
from .writer import OutputTensor

DECODERS = ("nemotron_spec", "sbd_lossless")  # that draft
# The matrices that an adapter may change, by their names in the model file.
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def draft_path(model: Path) -> Path:
    """Beside the model file: model.draft.bin for model.bin."""
    return model.with_name(f"{model.stem}.draft{model.suffix}")


def draft_metadata(
    adapter: LoraAdapter, architecture: str, decoders: list[str]
) -> dict[str, Value]:
    if not set(DECODERS) & set(decoders):
        raise ConvertError(
            f"--draft-lora: only the decoders {' and '.join(DECODERS)} draft with an adapter: the "
            f"file's are {', '.join(decoders)}; to merge one, give it with --lora"
        )
    ranks = sorted({change.right.shape[0] for change in adapter.changes.values()})
    if len(ranks) != 1:
        raise ConvertError(f"--draft-lora: expected pairs of one rank, got ranks {ranks}")
    return {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        # Readers multiply by alpha / rank; lora_b holds that scale already.
        "adapter.lora.alpha": float(ranks[0]),
    }


def draft_tensors(
    adapter: LoraAdapter, specs: list[TensorSpec], wanted: WeightType
) -> Iterator[OutputTensor]:
    """Of an adapter that changes nothing but the layers' matrices."""
    names = {spec.source for spec in specs if spec.name.split(".")[-2] in MATRICES}
    others = sorted({*adapter.changes, *adapter.replacements} - names)
    if others:
        raise ConvertError(
            f"--draft-lora: expected changes to the layers' matrices alone, got {listed(others)}"
        )
    dtype = WeightType.F32 if wanted == WeightType.F32 else WeightType.F16
    yield from adapter_tensors(adapter, specs, dtype)


def adapter_tensors(
    adapter: LoraAdapter, specs: list[TensorSpec], dtype: WeightType
) -> Iterator[OutputTensor]:
    """For each changed matrix [out, in]: NAME.lora_a [rank, in] and NAME.lora_b [out, rank], whose
    rows are in the order of the matrix's own."""
    by_source = {spec.source: spec for spec in specs}
    for source, change in adapter.changes.items():
        spec, left = by_source[source], change.left
        if spec.rotary_head_dim:
            left = interleave_rotary(left, spec.rotary_head_dim)
        yield matrix_tensor(f"{spec.name}.lora_a", change.right, dtype)
        yield matrix_tensor(f"{spec.name}.lora_b", left, dtype)


def matrix_tensor(name: str, matrix: NDArray[np.float32], dtype: WeightType) -> OutputTensor:
    return OutputTensor(name, matrix.shape, dtype, [partial(encode, matrix, dtype, name)])
