"""A run that trains a draft adapter: what `Trainer` does, measured on held-out answers.

At every save it drafts in one forward where held-out answers have their blocks, and keeps the
adapter whose drafts agree furthest; once `patience` saves have brought none better it is done.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from convert.replacing import replacing
from training.answers import Answer, LikeLengths
from training.draft_objective import DraftObjective, Masking, double
from training.examples import Sequence
from training.objective import Batch
from training.parallel import average_gradients
from training.trainer import Point, Recipe, Trainer

# Writes a file of a state dict and of what its drafts promise, by slot.
Writer = Callable[[Path, dict[str, torch.Tensor], list[float], list[float]], None]
ADAPTER = "adapter.gguf"  # the best so far, in the run's folder


class DraftTrainer(Trainer):
    """`measured`: held-out answers, like lengths side by side, every `measure_every` steps. The
    best adapter so far is in the run's folder, by `write`, and at `adapter`."""

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

    def __init__(
        self,
        objective: DraftObjective,
        recipe: Recipe,
        data: LikeLengths,
        out: Path,
        settings: dict[str, Any],
        device: torch.device,
        measured: list[Answer],
        adapter: Path,
        measure_every: int,
        patience: int,
        write: Writer,
    ) -> None:
        self.measured, self.measure_every, self.patience = measured, measure_every, patience
        self.adapter, self.write = adapter, write
        self.tokens = 0  # of the answers and prompts that it has been trained on
        self.held_out: list[Point] = []
        self.block_size = objective.block_size
        model = objective.model
        super().__init__(model, recipe, data, out, model.dtype, settings, device, objective)
        self._resumed_at, self._tokens_then = self.step, self.tokens
        if self.step:  # in case that its last save was cut off
            whole = get_model_state_dict(model, options=self.whole)
            if self.rank == 0:
                self._write(whole, out)
                self._publish()

    @property
    def best(self) -> Point | None:
        """The first of the measurements that no later one is better than, by both ways to draft."""
        return max(self.held_out, key=lambda p: p["prefix"] + p["prefix_fused"], default=None)

    @property
    def done(self) -> bool:
        return super().done or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether nothing better came in the last `patience` measurements."""
        best = self.best
        if not self.patience or best is None:
            return False
        return self.held_out.index(best) + self.patience < len(self.held_out)

    @property
    def tokens_per_step(self) -> float:
        return (self.tokens - self._tokens_then) / max(1, self.step - self._resumed_at)

    def trial(self) -> tuple[float, int]:
        """Seconds that the rest of the run will take, and the bytes it takes at most, by forward
        and backward passes of the step at hand, of which nothing stays."""
        recipe, sequences = self.recipe, self.data.step(self.step)
        mine = range(self.rank, recipe.batch_size, self.world)[: recipe.micro_batch_size]
        part = [sequences[i] for i in mine]
        generators = [torch.Generator().manual_seed(i) for i in mine]
        batch = self._batch(part, generators, Masking(one_shot=True))
        for _ in range(2):  # the first one finds nothing where it will be
            started = time.perf_counter()
            torch.autograd.backward(self._losses(batch).loss)
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - started
        per_token = seconds / sum(len(example.tokens) for (example,) in part) / self.world
        per_answer = self.data.tokens / len(self.data)
        tokens = (recipe.steps - self.step) * recipe.batch_size * per_answer
        # A measurement drafts twice, and goes back for neither: about as long as training.
        measurements = recipe.steps // self.measure_every - self.step // self.measure_every
        tokens += measurements * sum(len(answer.tokens) for answer in self.measured)
        return tokens * per_token, self._peak_bytes()

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _train_step(self) -> torch.Tensor:
        self.tokens += sum(
            len(e.tokens) for sequence in self.data.step(self.step) for e in sequence
        )
        return super()._train_step()

    def _place(self) -> None:
        """All of it in every process: of a frozen model only the adapter's gradients are shared."""
        self.objective.to(self.device)

    def _share_gradients(self) -> None:
        if self.world > 1:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            average_gradients(trained, self.world, dist.all_reduce)

    def _draw(self, rng: Random) -> Masking:
        return Masking(one_shot=rng.random() < 0.5)

    def _batch(
        self, sequences: list[Sequence], generators: list[torch.Generator], drawn: Masking
    ) -> Batch:
        return double(sequences, self.block_size, drawn, generators, self.recipe.noisy_multiple)

    def _curve_point(self) -> Point:
        labels, entropies, right = self.sums[1:].view(3, 2, self.block_size).clone()
        self.sums.zero_()
        by_slot = [
            round(share, 4) for share in (right.sum(0) / labels.sum(0).clamp(min=1)).tolist()
        ]
        loss = (entropies.sum() / labels.sum().clamp(min=1)).item()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": round(loss, 4),
            "right": by_slot,  # of all masked slots, in one-shot drafts and others
        }

    def save(self) -> None:
        if self.step % self.measure_every == 0 or self.step == self.recipe.steps:
            if not self.held_out or self.held_out[-1]["step"] != self.step:
                self.held_out.append(self._measure())
        super().save()
        if self.rank == 0 and self.best and self.best["step"] == self.step:
            self._publish()

    def _publish(self) -> None:
        best = self.out / ADAPTER
        if best.exists():
            with replacing([self.adapter]) as (copy,):
                shutil.copyfile(best, copy)

    def _write(self, whole: dict[str, torch.Tensor], folder: Path) -> None:
        best = self.best
        if best is not None and best["step"] == self.step:
            self.write(folder / ADAPTER, whole, best["acceptance"], best["acceptance_fused"])

    def _measure(self) -> Point:
        """Of one-shot drafts on held-out answers: how far they agree."""
        kinds = sorted({answer.kind for answer in self.measured})
        counts = torch.zeros(2, len(kinds), 2, self.block_size, dtype=torch.float64)
        groups = self._groups(kinds)
        for first in range(0, len(groups), self.world):  # all processes, as often
            number = first + self.rank
            kind, sequences = groups[number % len(groups)]
            for way in 0, 1:
                generators = [torch.Generator().manual_seed(0) for _ in sequences]
                masking = Masking(one_shot=True, fused=way, offsets=False)
                batch = self._batch(sequences, generators, masking)
                with torch.no_grad(), self._precision():
                    agreement = self.objective(batch.to(self.device), judged=True)
                if number < len(groups):
                    counts[way, kind] += torch.stack(agreement).double().cpu()
        if self.world > 1:
            counts = counts.to(self.device)
            dist.all_reduce(counts)
            counts = counts.cpu()
        known, fused = (figures(*each.sum(0)) for each in counts)
        return {
            "step": self.step,
            "tokens": self.tokens,
            **known,
            "prefix_fused": fused["prefix"],
            "acceptance_fused": fused["acceptance"],
            "by_kind": {
                kind or "all": figures(*counts[0, i])["prefix"] for i, kind in enumerate(kinds)
            },
        }

    def _groups(self, kinds: list[str]) -> list[tuple[int, list[Sequence]]]:
        """The held-out answers of each kind as batches."""
        size, groups = self.recipe.micro_batch_size, []
        for kind, name in enumerate(kinds):
            sequences: list[Sequence] = [[a.example] for a in self.measured if a.kind == name]
            groups += [(kind, sequences[i : i + size]) for i in range(0, len(sequences), size)]
        return groups

    def summary(self) -> dict[str, Any]:
        return {**super().summary(), "tokens": self.tokens, "held_out": self.held_out}

    def _take(self, saved: dict[str, Any]) -> None:
        super()._take(saved)
        self.tokens, self.held_out = saved["tokens"], saved["held_out"]


def figures(offered: torch.Tensor, kept: torch.Tensor) -> dict[str, Any]:
    """prefix: slots behind slot 0 that agree up to the first that does not, in the mean of blocks;
    acceptance: by slot, the chance that it is right where those before it are, counted as if every
    slot had been right half a time once."""
    chances = [1.0, *((kept + 0.5) / (offered + 1))[1:].tolist()]
    reached, prefix = 1.0, 0.0
    for i in range(1, len(chances)):
        reached *= float(kept[i] / offered[i]) if offered[i] else 0.0
        prefix += reached
    return {"prefix": round(prefix, 4), "acceptance": [round(chance, 4) for chance in chances]}
