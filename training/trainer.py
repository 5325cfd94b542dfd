"""The training loop: AdamW on the SBD objective, resumable to the bit, one folder per run.

The folder is a transformers checkpoint (`model.safetensors`, `config.json`, ...) with
`checkpoint.pt` (optimizer, step, loss curve) and `training.json` (recipe, loss curve) beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from training.objective import draw_masked, sbd_loss


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside its data and its model. Sizes in clean tokens."""

    steps: int
    batch_tokens: int = 2048
    lengths: tuple[int, ...] = (128, 128, 128, 128, 128, 256, 256, 512)  # one drawn per step
    block_sizes: tuple[int, int] = (2, 16)  # one drawn per step, both ends included
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    cooldown: float = 1.0  # the share of the steps, at the end, that takes the cosine; 1: all of it
    final_learning_rate: float = 0.02  # share of the peak
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_norm: float = 1.0
    bfloat16: bool = True
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warmup, the peak, and a cosine down to `final_learning_rate` of it."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        start = max(self.warmup_steps, round(self.steps * (1 - self.cooldown)))
        done = max(0.0, (step - start) / max(1, self.steps - start))
        floor, cosine = self.final_learning_rate, (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * warm * (floor + (1 - floor) * cosine)


class Trainer:
    """One run in folder `out`.

    `batch(step, batch_size, length)` gives its tokens; `data_id` names the data behind it.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        batch: Callable[[int, int, int], Tensor],
        data_id: str,
        out: Path,
    ) -> None:
        self.model, self.recipe, self.out = model, recipe, out
        self.batch, self.data_id = batch, data_id
        self.device = next(model.parameters()).device
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )
        self.step = 0
        self.curve: list[dict[str, float]] = []
        if self._checkpoint.exists():
            self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def run(self, save_every: int = 200, report_every: int = 20) -> None:
        """Train from the current step to the last, saving as it goes."""
        started, first, sums = time.monotonic(), self.step, [0.0, 0.0]
        while self.step < self.recipe.steps:
            ntp, matp = self._train_step()
            sums = [sums[0] + ntp, sums[1] + matp]
            self.step += 1
            if self.step % report_every == 0:
                ntp, matp = (round(total / report_every, 4) for total in sums)
                sums = [0.0, 0.0]
                self.curve.append({"step": self.step, "ntp": ntp, "matp": matp})
                per_step = (time.monotonic() - started) / (self.step - first)
                print(
                    f"step {self.step}/{self.recipe.steps}  ntp {ntp:.3f}  matp {matp:.3f}  "
                    f"{self.recipe.batch_tokens / per_step:.0f} tok/s  "
                    f"{(self.recipe.steps - self.step) * per_step / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.save()

    def _train_step(self) -> tuple[float, float]:
        """One optimizer step. Its draws depend on (seed, step) alone."""
        recipe = self.recipe
        rng = Random(f"{recipe.seed} step {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        block_size = rng.randint(*recipe.block_sizes)
        length = rng.choice(recipe.lengths)
        tokens = self.batch(self.step, recipe.batch_tokens // length, length)
        masked = draw_masked(len(tokens), length, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bfloat16):
            losses = sbd_loss(
                self.model,
                tokens.to(self.device),
                masked.to(self.device),
                block_size,
                self.model.config.mask_token_id,
            )
        torch.autograd.backward(losses.total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.ntp.item(), losses.matp.item()

    def save(self) -> None:
        """Write the run's folder; every file appears whole or not at all, the checkpoint last."""
        self.out.mkdir(parents=True, exist_ok=True)
        staging = self.out / "saving"
        self.model.save_pretrained(staging)
        (staging / "training.json").write_text(json.dumps(self.summary(), indent=1) + "\n")
        torch.save(
            {
                "recipe": dataclasses.asdict(self.recipe),
                "data": self.data_id,
                "step": self.step,
                "curve": self.curve,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            staging / self._checkpoint.name,
        )
        for path in sorted(staging.iterdir(), key=lambda path: path.name == self._checkpoint.name):
            os.replace(path, self.out / path.name)
        staging.rmdir()

    def summary(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.data_id,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "step": self.step,
            "tokens": self.step * self.recipe.batch_tokens,
            "loss": self.curve,
        }

    def _resume(self) -> None:
        """Continue the run in `out`. `steps` may differ as long as no step taken would have."""
        state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        past, now = Recipe(**state["recipe"]), self.recipe
        same_past = dataclasses.replace(past, steps=now.steps) == now and all(
            past.learning_rate_at(step) == now.learning_rate_at(step)
            for step in range(state["step"])
        )
        if not same_past or state["data"] != self.data_id:
            raise ValueError(
                f"{self._checkpoint} belongs to another run: expected {now} on data "
                f"{self.data_id}, it has {past} on data {state['data']}; use that recipe and "
                "data, or another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve = state["step"], state["curve"]
