"""ONNX Runtime: its CPU provider, int8 products, KV cache in place."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .onnx_graph import Graph

_PREFILL_ROWS = 64  # every row's logits are made


class OnnxRuntime:
    def __init__(self, folder: str, weights: str, threads: int, n_ctx: int) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            Graph(Path(folder), config, 4 if weights == "int4" else 8, n_ctx).build(),
            options,
            providers=["CPUExecutionProvider"],
        )
        shape = (1, config["num_key_value_heads"], n_ctx, config["head_dim"])
        self._kv = {
            f"{layer}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros(shape, dtype=np.float32)
            )
            for layer in range(config["num_hidden_layers"])
            for part in ("key", "value")
        }
        self._vocab_size = config["vocab_size"]
        self._logits: dict[int, onnxruntime.OrtValue] = {}
        self._context = 0
        self.about = f"onnxruntime {onnxruntime.__version__}"

    def time(
        self, rows: int, context: int, repeats: int, setting: dict[str, Any]
    ) -> Sequence[float]:
        if self._context != context:
            for begin in range(0, context, _PREFILL_ROWS):
                end = min(begin + _PREFILL_ROWS, context)
                self._forward(range(100 + begin, 100 + end), begin)
            self._context = context
        milliseconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            self._forward(range(100, 100 + rows), context)
            milliseconds.append(1e3 * (time.perf_counter() - start))
        return milliseconds[1:]

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], setting: dict[str, Any]
    ) -> NDArray[np.float32]:
        self._context = 0
        self._forward(prompt, 0)
        logits: NDArray[np.float32] = self._forward(tokens, len(prompt)).numpy()[0]
        return logits

    def _forward(self, tokens: Sequence[int], past: int) -> Any:
        """Logits [1, len(tokens), vocab_size]; the KV cache is the same buffers in and out."""
        rows = len(tokens)
        if rows not in self._logits:
            self._logits[rows] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                (1, rows, self._vocab_size), np.float32
            )
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([list(tokens)], dtype=np.int64))
        binding.bind_cpu_input("seqlens_k", np.array([past + rows - 1], dtype=np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(past + rows, dtype=np.int32))
        binding.bind_ortvalue_output("logits", self._logits[rows])
        for name, buffer in self._kv.items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        self._session.run_with_iobinding(binding)
        return self._logits[rows]


def load(options: dict[str, Any]) -> OnnxRuntime:
    return OnnxRuntime(**options)
