"""A draft adapter as a GGUF file: llama.cpp's layout of adapters, and what drafting needs.

`NAME.lora_a` is [rank, in], `NAME.lora_b` [out, rank]; readers multiply by alpha / rank.
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType as WeightType
from torch import Tensor

from convert.draft import adapter_tensors, matrix_tensor
from convert.lora import LoraAdapter, LowRank
from convert.writer import write_gguf
from training.checkpoint import lora_pairs
from training.draft_objective import MASK_EMBEDDING
from training.model_file import ModelFile


def write_adapter(
    path: Path,
    base: ModelFile,
    state: dict[str, Tensor],
    alpha: float,
    block_size: int,
    acceptance: list[float],
    acceptance_fused: list[float],
) -> None:
    """Whole, or not at all. `state` has the adapter and, where the model has no mask token, the
    mask's embedding. `acceptance`: by slot of a block, the chance that it is right where those
    before it are; slot 0 is known, or, of `acceptance_fused`, decided in the draft's own forward.
    """
    changes = {
        name: LowRank(b.float().numpy(), a.float().numpy())
        for name, (b, a) in lora_pairs(state).items()
    }
    adapter = LoraAdapter(changes, {})
    tensors = [*adapter_tensors(adapter, base.specs, WeightType.F16)]
    if MASK_EMBEDDING in state:
        vector = state[MASK_EMBEDDING].float().numpy()
        tensors.append(matrix_tensor("sbd.draft.mask_embedding", vector, WeightType.F32))
    metadata = {
        "general.architecture": base.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        "sbd.block_size": block_size,
        "sbd.draft.acceptance": acceptance,
        "sbd.draft.acceptance_fused": acceptance_fused,
        "sbd.draft.fingerprint": base.fingerprint,
    }
    write_gguf(path, metadata, tensors)
