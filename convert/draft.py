"""A LoRA adapter that only drafts, in a file of its own: GGUF's layout of adapters.

Merged, it would change the model that verifies; in the model's file, llama.cpp would refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as WeightType
from numpy.typing import NDArray

from .architectures import TensorSpec
from .errors import ConvertError, listed
from .lora import LoraAdapter
from .quantize import encode
from .values import Value
from .writer import OutputTensor

DECODER = "nemotron_spec"


def draft_path(model: Path) -> Path:
    """Beside the model file: model.draft.bin for model.bin."""
    return model.with_name(f"{model.stem}.draft{model.suffix}")


def draft_metadata(
    adapter: LoraAdapter, architecture: str, decoders: list[str]
) -> dict[str, Value]:
    if DECODER not in decoders:
        raise ConvertError(
            f"--draft-lora: only the decoder {DECODER} drafts with an adapter: the file's are "
            f"{', '.join(decoders)}; to merge one, give it with --lora"
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
    """For each output projection [out, in]: NAME.lora_a [rank, in] and NAME.lora_b [out, rank]."""
    dtype = WeightType.F32 if wanted == WeightType.F32 else WeightType.F16
    names = {spec.source: spec.name for spec in specs if ".attn_output." in spec.name}
    others = sorted({*adapter.changes, *adapter.replacements} - {*names})
    if others:
        raise ConvertError(
            f"--draft-lora: expected changes to output projections alone, got {listed(others)}"
        )
    for source, change in adapter.changes.items():
        for side, matrix in ("a", change.right), ("b", change.left):
            yield _tensor(f"{names[source]}.lora_{side}", matrix, dtype)


def _tensor(name: str, matrix: NDArray[np.float32], dtype: WeightType) -> OutputTensor:
    return OutputTensor(name, matrix.shape, dtype, lambda: iter([encode(matrix, dtype, name)]))
