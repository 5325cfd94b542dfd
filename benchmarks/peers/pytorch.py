"""PyTorch with the model as transformers has it: bfloat16, or dynamic int8 (FBGEMM)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache


class PyTorch:
    def __init__(self, folder: str, weights: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        dtype = torch.bfloat16 if weights == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if weights == "int8":
            quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a successor is announced; this one is faster here
                model = quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        self._model = model
        self._cache = DynamicCache()
        self.about = f"torch {torch.__version__}, transformers {transformers.__version__}"

    def time(
        self, rows: int, context: int, repeats: int, setting: dict[str, Any]
    ) -> Sequence[float]:
        if self._cache.get_seq_length() != context:
            self._cache = DynamicCache()
            self._forward(range(100, 100 + context), 1)
        milliseconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            self._forward(range(100, 100 + rows))
            milliseconds.append(1e3 * (time.perf_counter() - start))
            self._cache.crop(-rows)
        return milliseconds[1:]

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], setting: dict[str, Any]
    ) -> NDArray[np.float32]:
        self._cache = DynamicCache()
        self._forward(prompt)
        logits: NDArray[np.float32] = self._forward(tokens)[0].float().numpy()
        return logits

    def _forward(self, tokens: Sequence[int], logits_to_keep: int = 0) -> torch.Tensor:
        ids = torch.tensor([list(tokens)])
        out = self._model(
            ids, past_key_values=self._cache, use_cache=True, logits_to_keep=logits_to_keep
        )
        logits: torch.Tensor = out.logits
        return logits


def load(options: dict[str, Any]) -> PyTorch:
    return PyTorch(**options)
