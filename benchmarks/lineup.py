"""Which engine runs which weights, and how: what cpu_peers.py puts side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Types that are compared with each other, and loaded at the same time.
CLASSES = {
    "16 bits": ("bf16", "f16"),
    "8 bits": ("q8_0",),
    "6 bits": ("q6_k",),
    "5 bits": ("q5_0", "q5_1", "q5_k"),
    "4 bits": ("q4_0", "q4_1", "q4_k", "iq4_nl", "iq4_xs"),
    "3 bits": ("q3_k",),
    "2 bits": ("q2_k",),
}
PEERS = ("llama.cpp", "OpenVINO", "onnxruntime", "PyTorch")
OURS = "sbd-engine"


@dataclass
class Entry:
    """One engine with one kind of weights. The best of `settings` counts, at each row count."""

    engine: str
    weights: str
    weight_class: str
    module: str
    options: dict[str, Any]
    settings: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weights}"


def entries(
    weight_class: str,
    files: dict[str, Path],
    folder: Path,
    engines: list[str],
    threads: int,
    n_ctx: int,
    plain_llama: bool,
) -> list[Entry]:
    """files: the model files of this class by type; folder: the checkpoint they come from."""
    common = {"threads": threads, "n_ctx": n_ctx}
    out = []
    for dtype, path in files.items():
        gguf = {"path": str(path), **common}
        out.append(Entry(OURS, dtype, weight_class, "peers.ours", gguf))
        out.append(
            Entry(
                "llama.cpp",
                dtype,
                weight_class,
                "peers.llama",
                {**gguf, "plain": plain_llama},
                [{"flash_attention": True}, {"flash_attention": False}],
            )
        )
    precision = {"16 bits": "bf16", "8 bits": "int8", "4 bits": "int4"}.get(weight_class)
    if precision:
        # BF16 quantises no activations. The KV cache is the plugin's default, 8 bits: the others
        # have F16.
        groups = [32] if precision == "bf16" else [32, 128, 0]
        settings = [{"group": group, "kv": "u8"} for group in groups]
        options = {"folder": str(folder), "weights": precision, "settings": settings, **common}
        out.append(
            Entry("OpenVINO", precision, weight_class, "peers.openvino_peer", options, settings)
        )
    if precision in ("int8", "int4"):
        options = {"folder": str(folder), "weights": precision, **common}
        out.append(Entry("onnxruntime", precision, weight_class, "peers.onnx_runtime", options))
    if precision in ("bf16", "int8"):
        options = {"folder": str(folder), "weights": precision, "threads": threads}
        out.append(Entry("PyTorch", precision, weight_class, "peers.pytorch", options))
    return [entry for entry in out if entry.engine in (OURS, *engines)]
