"""PyTorch on a device: next-token decoding of random weights with the model as transformers has it,
a static cache and `torch.compile`."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from .worker import Missing


class StaticDecoding:
    def __init__(self, config: dict[str, Any], device: str, n_ctx: int) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise Missing("torch finds no GPU")
        torch.set_grad_enabled(False)
        self._device = torch.device(device)
        with self._device:
            make: Any = AutoModelForCausalLM.from_config
            self._model = make(AutoConfig.for_model(**config), dtype=torch.bfloat16).eval()
        self._cache: Any = StaticCache(config=self._model.config, max_cache_len=n_ctx)
        self._step = torch.compile(self._next, mode="reduce-overhead", fullgraph=True)
        self.about = f"torch {torch.__version__}, transformers {transformers.__version__}"

    def tok_s(self, context: int, tokens: int) -> float:
        """Greedy decoding of so many tokens; none of them leaves the device meanwhile."""
        self._cache.reset()
        prompt = torch.arange(100, 100 + context, device=self._device)[None]
        token = self._next(prompt % 1000, torch.arange(context, device=self._device))
        positions = torch.arange(context, context + tokens + 3, device=self._device)
        for position in positions[:3]:  # compiles, and captures its graph
            token = self._step(token, position[None]).clone()
        self._wait()
        begun = time.perf_counter()
        for position in positions[3:]:
            token = self._step(token, position[None]).clone()
        self._wait()
        return tokens / (time.perf_counter() - begun)

    def _next(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self._model(
            ids,
            past_key_values=self._cache,
            use_cache=True,
            cache_position=positions,
            position_ids=positions[None],
            logits_to_keep=1,
        )
        token: torch.Tensor = out.logits[:, -1:].argmax(-1)
        return token

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def load(options: dict[str, Any]) -> StaticDecoding:
    return StaticDecoding(**options)
