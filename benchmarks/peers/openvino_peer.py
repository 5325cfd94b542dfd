"""OpenVINO's CPU plugin with paged attention, as its own generation library runs models."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino._offline_transformations import paged_attention_transformation

from .openvino_graph import qwen3

_BLOCK = 32  # positions of one page of the KV cache
_WHOLE_ROW = 2**64 - 1


class Compiled:
    """The model for one group size of dynamic activation quantisation, with a KV cache."""

    def __init__(self, model: ov.Model, group_size: int, kv: str, threads: int, n_ctx: int) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group_size or _WHOLE_ROW),
            "KV_CACHE_PRECISION": kv,
        }
        compiled = ov.Core().compile_model(model, "CPU", settings)
        self._request = compiled.create_infer_request()
        self._blocks = -(-n_ctx // _BLOCK)
        for port in compiled.inputs:
            name = port.get_any_name()
            if name.startswith(("key_cache.", "value_cache.")):
                shape = [
                    self._blocks,
                    *(d.get_length() for d in list(port.get_partial_shape())[1:]),
                ]
                tensor = ov.Tensor(port.get_element_type(), ov.Shape(shape))
                tensor.data.view(np.uint8)[...] = 0
                self._request.set_tensor(name, tensor)

    def forward(self, tokens: Sequence[int], past: int) -> NDArray[np.float32]:
        """[len(tokens), 1, vocab_size], valid until the next forward."""
        rows = len(tokens)
        used = -(-(past + rows) // _BLOCK)
        inputs = {
            "input_ids": np.array(tokens, dtype=np.int64),
            "position_ids": np.arange(past, past + rows, dtype=np.int64),
            "past_lens": np.array([past], dtype=np.int32),
            "subsequence_begins": np.array([0, rows], dtype=np.int32),
            "block_indices": np.arange(used, dtype=np.int32),
            "block_indices_begins": np.array([0, used], dtype=np.int32),
            "max_context_len": np.array(past + rows, dtype=np.int32),
        }
        results = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        logits: NDArray[np.float32] = results["logits"]
        return logits


class OpenVino:
    """Settings: group (0 is a whole row) and kv, the precision of the KV cache."""

    def __init__(
        self, folder: str, weights: str, threads: int, n_ctx: int, settings: list[dict[str, Any]]
    ) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        model = qwen3(Path(folder), config, weights)
        paged_attention_transformation(model)
        self._compiled = {
            json.dumps(setting): Compiled(model, setting["group"], setting["kv"], threads, n_ctx)
            for setting in settings
        }
        self._context: dict[str, int] = {}
        self.about = f"OpenVINO {ov.__version__.split('-')[0]}"

    def time(
        self, rows: int, context: int, repeats: int, setting: dict[str, Any]
    ) -> Sequence[float]:
        key = json.dumps(setting)
        model = self._compiled[key]
        if self._context.get(key) != context:
            for begin in range(0, context, _BLOCK):
                model.forward(range(100 + begin, 100 + min(begin + _BLOCK, context)), begin)
            self._context[key] = context
        milliseconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model.forward(range(100, 100 + rows), context)
            milliseconds.append(1e3 * (time.perf_counter() - start))
        return milliseconds[1:]

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], setting: dict[str, Any]
    ) -> NDArray[np.float32]:
        key = json.dumps(setting)
        self._context.pop(key, None)
        self._compiled[key].forward(prompt, 0)
        return self._compiled[key].forward(tokens, len(prompt))[:, 0]


def load(options: dict[str, Any]) -> OpenVino:
    return OpenVino(**options)
