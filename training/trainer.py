"""The training loop: AdamW on the SBD objective or on next tokens alone, resumable to the bit.

A run lives in one folder. It is a transformers checkpoint, replaced whole at every save, with
`training.json` (recipe and loss curve) and `resume-STEP/` (full-precision weights, optimizer)
beside it. Everything a step draws depends on the seed and the step alone, and its loss is divided
by one count for the whole step: neither micro-batches nor the number of processes change it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from training.checkpoint import write_model
from training.errors import AnotherRunError, TrainingError
from training.examples import Data, Sequence
from training.objective import Batch, Objective, double
from training.parallel import shard


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside its data and its model. Sizes in clean tokens."""

    steps: int
    length: int = 4096  # of a sequence, the room that documents are packed into
    batch_size: int = 16  # sequences per step, over all processes
    micro_batch_size: int = 1  # sequences per forward
    objective: Literal["sbd", "ntp", "draft"] = "sbd"
    block_sizes: tuple[int, int] = (2, 16)  # one drawn per step, both ends included
    noisy_multiple: int = 128  # noisy copies are filled up to one, for fewer different shapes
    learning_rate: float = 3e-4
    warmup_steps: int = 200
    cooldown: float = 1.0  # the share of the steps, at the end, that takes the cosine; 1: all of it
    final_learning_rate: float = 0.1  # share of the peak
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_norm: float = 1.0
    bfloat16: bool = True  # autocast; the weights stay float32
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warmup, the peak, and a cosine down to `final_learning_rate` of it."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        start = max(self.warmup_steps, round(self.steps * (1 - self.cooldown)))
        done = max(0.0, (step - start) / max(1, self.steps - start))
        floor, cosine = self.final_learning_rate, (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * warm * (floor + (1 - floor) * cosine)


Point = dict[str, Any]  # of a run's curve: its step, and means since the point before it
Report = Callable[[Point, Recipe], None]


def described(point: Point) -> str:
    """Its losses, and, by slot of a block, how many drafted tokens were right."""
    parts = [f"{key} {point[key]:.3f}" for key in ("ntp", "matp", "loss") if key in point]
    if "right" in point:
        parts.append(f"right {'/'.join(f'{100 * share:.0f}' for share in point['right'][1:5])} %")
    return ", ".join(parts)


def print_progress(point: Point, recipe: Recipe) -> None:
    print(
        f"step {point['step']}/{recipe.steps}  {described(point)}  "
        f"{point['tok_s']:.0f} tok/s  {point['seconds_left'] / 60:.0f} min left",
        file=sys.stderr,
        flush=True,
    )


class Trainer:
    """One run in folder `out`, resumed where it holds one.

    `dtype` is of the weights in the checkpoint it writes; the model's own are better float32.
    `settings`, JSON, is what else the run depends on: it too must be the same to resume.
    `objective`: the loss, None for `training.objective`'s.
    """

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # what a save writes

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        data: Data,
        out: Path,
        dtype: torch.dtype = torch.float32,
        settings: dict[str, Any] | None = None,
        device: torch.device | None = None,
        objective: Any = None,
    ) -> None:
        self.model, self.recipe, self.data, self.out = model, recipe, data, out
        self.dtype, self.settings = dtype, settings or {}
        self.device = device or next(model.parameters()).device
        self.objective = objective or Objective(model)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if recipe.batch_size % (self.world * recipe.micro_batch_size):
            raise TrainingError(
                f"batch_size is {recipe.batch_size}, expected a multiple of {self.world} "
                f"processes x micro_batch_size {recipe.micro_batch_size}"
            )
        self._place()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step = 0
        self.curve: list[Point] = []
        self.sums = torch.zeros(
            self.objective.sums, dtype=torch.float64
        )  # since the curve's last point
        for folder in resume_folders(out)[-1:]:
            self._resume(folder)

    def run(
        self,
        save_every: int = 200,
        report_every: int = 20,
        report: Report = print_progress,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train from the current step to the last, saving as it goes; once `stop()`, in any
        process, to the end of the step at hand."""
        self.model.train()
        started, first, last = time.monotonic(), self.step, self.recipe.steps
        stopping = False
        while not self.done and not stopping:
            self.sums += self._train_step()
            self.step += 1
            stopping = self._in_any_process(stop())
            if self.step % report_every == 0 or self.step == last:
                point = self._curve_point()
                self.curve.append(point)
                per_step = (time.monotonic() - started) / (self.step - first)
                pace = {
                    "tok_s": self.tokens_per_step / per_step,
                    "seconds_left": (last - self.step) * per_step,
                }
                if self.rank == 0:
                    report(point | pace, self.recipe)
            if self.step % save_every == 0 or self.step == last or stopping:
                self.save()

    @property
    def done(self) -> bool:
        return self.step >= self.recipe.steps

    @property
    def tokens_per_step(self) -> float:
        return self.recipe.batch_size * self.recipe.length

    def _in_any_process(self, flag: bool) -> bool:
        if self.world == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(count)
        return bool(count.item())

    def _train_step(self) -> torch.Tensor:
        """One optimizer step; the sums and counts of its losses, over all processes."""
        recipe = self.recipe
        rng = Random(f"{recipe.seed} step {self.step}")
        drawn = self._draw(rng)
        seeds = [rng.getrandbits(63) for _ in range(recipe.batch_size)]
        torch.manual_seed(seeds[0] + self.rank)  # for dropout, where a model has any
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(self.step)

        sequences = self.data.step(self.step)
        # The loss is divided by the answer tokens of the whole step: known before any forward, and
        # the same whatever was masked and however it is split.
        count = sum(example.labels for sequence in sequences for example in sequence)
        sums = torch.zeros(self.objective.sums, dtype=torch.float64, device=self.device)
        mine = range(self.rank, recipe.batch_size, self.world)
        for first in range(0, len(mine), recipe.micro_batch_size):
            part = mine[first : first + recipe.micro_batch_size]
            generators = [torch.Generator().manual_seed(seeds[i]) for i in part]
            batch = self._batch([sequences[i] for i in part], generators, drawn)
            losses = self._losses(batch)
            # FSDP takes the mean of the processes' gradients, and we want the sum.
            torch.autograd.backward(losses.loss * (self.world / count))
            sums += torch.cat([value.detach().double().flatten() for value in losses])
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world > 1:
            dist.all_reduce(sums)
        if not math.isfinite(sums.sum().item()):
            raise TrainingError(
                f"step {self.step + 1}: the loss is not finite: lower the learning rate, or look "
                "at the checkpoint's weights"
            )
        return sums.cpu()

    def _place(self) -> None:
        """Brings the model to where it is trained."""
        if self.world > 1:
            shard(self.objective, self.device, self.recipe.bfloat16)
        else:
            self.objective.to(self.device)

    def _share_gradients(self) -> None:
        """Makes each process's gradients their mean, where that is still to be done."""

    def _draw(self, rng: Random) -> Any:
        """What a step draws for all of its sequences: the block size, None for next tokens."""
        sizes = self.recipe.block_sizes
        return rng.randint(*sizes) if self.recipe.objective == "sbd" else None

    def _batch(
        self, sequences: list[Sequence], generators: list[torch.Generator], drawn: Any
    ) -> Batch:
        mask, multiple = self.model.config.mask_token_id, self.recipe.noisy_multiple
        return double(sequences, self.recipe.length, drawn, mask, generators, multiple)

    def _losses(self, batch: Batch) -> Any:
        with self._precision():
            return self.objective(batch.to(self.device))

    def _precision(self) -> AbstractContextManager[Any]:
        enabled = self.recipe.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def _curve_point(self) -> Point:
        ntp, matp, ntp_labels, matp_labels = self.sums.tolist()
        self.sums.zero_()
        point: Point = {"step": self.step, "ntp": round(ntp / max(1, ntp_labels), 4)}
        if self.recipe.objective == "sbd":
            point["matp"] = round(matp / max(1, matp_labels), 4)
        return point

    def save(self) -> None:
        """Replace the run's checkpoint; at any moment the folder holds a whole one, old or new."""
        staging = self.out / "saving"
        if self.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._barrier()
        with quietly():
            save_sharded(self._resumable(), checkpoint_id=staging / "resume")
        whole: dict[str, Any] = get_model_state_dict(self.model, options=self.whole)
        if self.rank == 0:
            progress = {**self.summary(), "unreported": self.sums.tolist()}
            write_json(staging / "resume" / "training.json", progress)
            past = resume_folders(self.out)
            os.rename(staging / "resume", self.out / f"resume-{self.step}")
            self._write(whole, staging)
            write_json(staging / "training.json", self.summary())
            for path in staging.iterdir():
                os.replace(path, self.out / path.name)
            staging.rmdir()
            for folder in past:
                if folder.name != f"resume-{self.step}":
                    shutil.rmtree(folder)
        self._barrier()

    def _write(self, whole: dict[str, torch.Tensor], folder: Path) -> None:
        """What a save leaves beside the run's record."""
        write_model(self.model, whole, self.dtype, folder)

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def summary(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "settings": self.settings,
            "data": self.data.fingerprint,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "step": self.step,
            "loss": self.curve,
        }

    def _resume(self, folder: Path) -> None:
        """Continue the run in `out`. `steps` may differ as long as no step taken would have."""
        try:
            saved = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in saved["recipe"].items()
            }
            past = Recipe(**fields)
            theirs = {"settings": saved["settings"], "data": saved["data"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TrainingError(
                f"{folder / 'training.json'}: not of a run that this version can go on with "
                f"({error!r}): use another folder"
            ) from None
        changed = self._changes(past, saved["step"], theirs)
        if changed:
            raise AnotherRunError(self.out, changed)
        state = self._resumable()
        with quietly():
            load_sharded(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),  # of a LoRA run it holds the adapter alone
        )
        self._take(saved)

    def _take(self, saved: dict[str, Any]) -> None:
        """The progress of a saved run."""
        self.step, self.curve = saved["step"], saved["loss"]
        self.sums = torch.tensor(saved["unreported"], dtype=torch.float64)

    def _changes(
        self, past: Recipe, steps: int, theirs: dict[str, Any]
    ) -> dict[str, tuple[Any, Any]]:
        """What a run in its first `steps` steps had other than this one: then and now."""
        now = dataclasses.asdict(self.recipe) | self.settings | {"data": self.data.fingerprint}
        then = dataclasses.asdict(past) | theirs["settings"] | {"data": theirs["data"]}
        changes = {
            name: (then.get(name), now.get(name))
            for name in [*now, *(then.keys() - now.keys())]
            if then.get(name) != now.get(name)
        }
        rates = self.recipe.learning_rate_at
        if all(past.learning_rate_at(step) == rates(step) for step in range(steps)):
            changes.pop("steps", None)
        if len(changes) > 1:
            changes.pop("data", None)  # its fingerprint follows the recipe too
        return changes

    def _resumable(self) -> dict[str, Any]:
        """What a run is resumed from: weights as they are trained, and the optimizer's state."""
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """A folder that no other run uses meanwhile; made if it is not there, and gone if it stays
    empty."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{out} is in use by another run: wait for its end, or use another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)
        with suppress(OSError):
            out.rmdir()


def resume_folders(out: Path) -> list[Path]:
    """What a run may resume from, the newest last."""
    return sorted(out.glob("resume-*"), key=lambda path: int(path.name.split("-")[1]))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def quietly() -> Iterator[None]:
    """A distributed checkpoint by a single process is meant as such."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
