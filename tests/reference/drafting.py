"""Random draft adapters: their GGUF files, and a float64 model whose drafting rows have one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model import Adapter, Array, ReferenceModel
from .random_model import RandomModel

MATRICES = {
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
ARCHITECTURES = {"mistral": "llama"}  # that GGUF calls otherwise


class DraftingModel:
    """A model whose rows of a block have the adapter: those at the end that all see everything.
    One row alone is no block."""

    def __init__(self, model: ReferenceModel, adapter: Adapter) -> None:
        self.model, self.adapter = model, adapter

    def forward(
        self, ids: Sequence[int], kv_end: NDArray[np.int64], last: int | None = None
    ) -> Array:
        block = int((kv_end == len(ids)).sum())
        adapted = block if block > 1 else 0
        return self.model.forward(ids, kv_end, last, self.adapter, adapted)


class RandomAdapter:
    """Low-rank changes to some of a model's matrices, each of a rank of its own, and a mask."""

    def __init__(
        self, model: RandomModel, seed: int, *, size: float = 0.15, mask_id: int | None = None
    ) -> None:
        rng = np.random.default_rng([seed, 99])
        config = model.config
        self.alpha = float(rng.uniform(4, 12))
        self.metadata: dict[str, Any] = {
            "general.architecture": ARCHITECTURES.get(config["model_type"], config["model_type"]),
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": np.float32(self.alpha),
        }
        self.tensors: dict[str, NDArray[np.float32]] = {}
        chosen = [name for name in MATRICES if seed == 0 or rng.uniform() < 0.7] or ["q"]
        deltas: list[dict[str, Array]] = []
        for i in range(config["num_hidden_layers"]):
            deltas.append({})
            for name in chosen:
                source, stored = MATRICES[name]
                out, inner = model.tensors[f"model.layers.{i}.{source}.weight"].shape
                rank = int(rng.integers(1, 1 + min(out, inner, 40)))
                a = (rng.standard_normal((rank, inner)) / np.sqrt(inner)).astype(np.float32)
                b = (rng.standard_normal((out, rank)) * size).astype(np.float32)
                scale = np.float32(self.alpha) / np.float64(rank)
                deltas[i][name] = (scale * (b.astype(np.float64) @ a)).T
                if name in "qk" and self.metadata["general.architecture"] == "llama":
                    b = interleaved(b, config["head_dim"])
                self.tensors[f"blk.{i}.{stored}.weight.lora_a"] = a
                self.tensors[f"blk.{i}.{stored}.weight.lora_b"] = b
        mask = rng.standard_normal(config["hidden_size"]).astype(np.float32)
        self.tensors["sbd.draft.mask_embedding"] = mask
        self.adapter = Adapter(deltas, mask.astype(np.float64), mask_id)

    def write(self, path: Path, **changes: Any) -> Path:
        """The file; `changes` are other values of its keys, by their last part, None: left out."""
        named = {key.rpartition(".")[2]: key for key in self.metadata}
        keys = self.metadata | {named.get(k, f"sbd.{k}"): v for k, v in changes.items()}
        return write_gguf(path, {k: v for k, v in keys.items() if v is not None}, self.tensors)


def interleaved(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of each head as a Llama's GGUF has them: dimension j beside j + head_dim / 2."""
    order = np.arange(head_dim).reshape(2, -1).T.ravel()
    return np.concatenate([rows[i : i + head_dim][order] for i in range(0, len(rows), head_dim)])


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    from gguf import GGUFWriter

    architecture = metadata["general.architecture"]
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, float(value))
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
