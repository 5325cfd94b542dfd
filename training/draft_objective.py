"""The objective of a draft adapter: the doubled sequence `[x ; x_hat]`, its second half adapted.

`x` is a model's own answer behind its prompt, read by the frozen model. `x_hat` is the answer in
blocks of `block_size`, read with the adapter; its block b reads the frozen model's keys and values
of the tokens before the block, and all of itself. The loss is of masked positions, each *at that
same position*: what the frozen model has written there.

Slot 0 of a block is known where verifying and drafting are two forwards; where they are one it is
still a mask while the block drafts, and the row before it decides it. So it is masked in half of
the blocks, and has no loss. Half of the steps mask all the other slots, as a draft in one forward
does, half of them at a rate eta ~ U(0, 1) for each document. What counts is how many slots agree
from the first on, so earlier ones weigh more: `decay` to the power of the slots before them.

Drafts begin wherever the one before them ended, so blocks are counted from a place drawn within the
first of them. Rows behind the answer's end hold the mask, as they will, and have no loss: no text
goes on there.

No gradient reaches the first half, and it is not computed: its keys and values are those of a plain
forward, in the cache that the second half reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from training.checkpoint import without_lora
from training.examples import Example, Sequence
from training.objective import IGNORED, Batch, attention_mask, clean_rows, stack

MASKED = -2  # in a batch's tokens: the mask, which need be no token of the vocabulary
MASK_EMBEDDING = "draft_mask_embedding"  # the parameter's name, beside the model's own
KNOWN, FUSED = 0, 1  # whether a block's slot 0 is known, or masked


class Masking(NamedTuple):
    """What a step masks."""

    one_shot: bool  # all slots behind slot 0
    fused: float = 0.5  # the share of blocks whose slot 0 is masked
    offsets: bool = True  # blocks begin somewhere in the first of them, not at the answer's begin


class DraftSums(NamedTuple):
    """The weighted loss, and by whether slot 0 was known and by slot, [2, block_size]: labels,
    cross-entropies, and how many tokens were the right ones. float32."""

    loss: Tensor
    labels: Tensor
    entropies: Tensor
    right: Tensor


class Agreement(NamedTuple):
    """Of one-shot drafts, by slot [block_size]: how many there were whose slots before it were all
    right, and of them those where it was too. float32."""

    offered: Tensor
    kept: Tensor


def double(
    sequences: list[Sequence],
    block_size: int,
    masking: Masking,
    generators: list[torch.Generator],
    multiple: int = 1,
) -> Batch:
    """The batch, of sequences of one document each; both halves are padded to a `multiple`, the
    noisy one to one of `block_size` as well. Each document draws from its own generator."""
    examples = [example for (example,) in sequences]
    noisy = [
        _noisy_rows(example, block_size, masking, generator)
        for example, generator in zip(examples, generators, strict=True)
    ]
    clean = _rounded(max(len(example.tokens) for example in examples), multiple)
    blocks = max(rows.shape[1] for rows in noisy) // block_size
    width = block_size * max(1, _rounded(blocks, -(-multiple // block_size)))
    rows = [
        torch.cat([stack([clean_rows(example, 0)], clean), stack([part], width)], 1)
        for example, part in zip(examples, noisy, strict=True)
    ]
    return Batch(clean, *torch.stack(rows).unbind(1))


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _noisy_rows(
    example: Example, block_size: int, masking: Masking, generator: torch.Generator
) -> Tensor:
    """A document's rows of x_hat, int64 [6, n], n a multiple of `block_size`."""
    answer = torch.as_tensor(example.tokens[example.prompt_length :], dtype=torch.int64)
    most = max(1, min(block_size, len(answer) - 1))  # a block of one token drafts nothing
    offset = int(torch.randint(most, (), generator=generator)) * masking.offsets
    start, answer = example.prompt_length + offset, answer[offset:]
    blocks = max(0, _rounded(len(answer) - 1, block_size)) // block_size
    n = blocks * block_size
    eta = torch.rand((), generator=generator)
    masked = torch.rand(n, generator=generator) < (1 if masking.one_shot else eta)
    slot = torch.arange(n) % block_size
    masked[::block_size] = torch.rand(blocks, generator=generator) < masking.fused
    truth = torch.cat([answer[:n], answer.new_full((max(0, n - len(answer)),), IGNORED)])
    masked[len(answer) :] = True
    return torch.stack(
        [
            truth.masked_fill(masked, MASKED),
            start + torch.arange(n),
            torch.zeros(n, dtype=torch.int64),
            start + torch.arange(n) - slot,
            torch.arange(n) // block_size,
            truth.masked_fill(~masked | (slot == 0), IGNORED),
        ]
    )


class DraftObjective(nn.Module):
    """A transformers causal LM with a LoRA (`checkpoint.add_lora`) under the loss of its drafts.

    `mask_token_id`: what fills masked slots; None is a vector that is learnt too, which begins as
    the mean of the embedding's rows.
    """

    def __init__(
        self, model: Any, block_size: int, decay: float, mask_token_id: int | None
    ) -> None:
        super().__init__()
        self.model, self.block_size, self.decay = model, block_size, decay
        self.mask_token_id = mask_token_id
        self.sums = 1 + 3 * 2 * block_size
        if mask_token_id is None:
            embedding = model.get_input_embeddings().weight
            # float32, as the adapter
            mean = embedding.detach().mean(dim=0, dtype=torch.float32)
            model.register_parameter(MASK_EMBEDDING, nn.Parameter(mean))

    def forward(self, batch: Batch, judged: bool = False) -> DraftSums | Agreement:
        """Of a batch to train on; `judged`: of one-shot drafts, which it is to be measured by."""
        hidden = self._drafted(batch)
        labels = batch.labels[:, batch.clean :]
        slot = (batch.positions - batch.past)[:, batch.clean :].clamp(min=0)  # padding has none
        labelled = labels != IGNORED
        head = self.model.lm_head.weight
        weights = self.decay ** (slot[labelled] - 1).float()
        loss, entropies, right = FrozenHead.apply(hidden[labelled], head, labels[labelled], weights)
        if judged:
            return self._judge(labelled, right)
        kind = self._fused(batch, slot)[labelled]
        place = kind * self.block_size + slot[labelled]
        columns = torch.stack([torch.ones_like(entropies), entropies, right])
        sums = columns.new_zeros(3, 2 * self.block_size).index_add_(1, place, columns)
        return DraftSums(loss, *sums.view(3, 2, self.block_size))

    def _drafted(self, batch: Batch) -> Tensor:
        """What the second half comes to before the head, [B, N, H]."""
        model, noisy = self.model, slice(batch.clean, None)
        cache = DynamicCache()
        with torch.no_grad(), without_lora(model):
            # By position: its name differs between versions of transformers.
            model.model(batch.tokens[:, : batch.clean], None, None, cache, use_cache=True)
        mask = attention_mask(
            batch, model.config._attn_implementation, model.dtype, first=batch.clean
        )
        embedded = self._embedded(batch.tokens[:, noisy])
        return model.model(  # type: ignore[no-any-return]
            None, mask, batch.positions[:, noisy], cache, embedded, use_cache=True
        ).last_hidden_state

    def _embedded(self, tokens: Tensor) -> Tensor:
        masked = tokens == MASKED
        filled = tokens.masked_fill(masked, self.mask_token_id or 0)
        embedded: Tensor = self.model.get_input_embeddings()(filled)
        if self.mask_token_id is not None:
            return embedded
        vector = self.model.get_parameter(MASK_EMBEDDING).to(embedded.dtype)
        return torch.where(masked[..., None], vector, embedded)

    def _fused(self, batch: Batch, slot: Tensor) -> Tensor:
        """Of each noisy row, whether its block's slot 0 is masked; int64 [B, N]."""
        masked = batch.tokens[:, batch.clean :] == MASKED
        first = torch.arange(slot.shape[1], device=slot.device) - slot
        return masked.gather(1, first).long()

    def _judge(self, labelled: Tensor, right: Tensor) -> Agreement:
        agrees = torch.zeros(labelled.shape, device=right.device)
        agrees[labelled] = right
        by_slot = agrees.view(-1, self.block_size)
        there = labelled.view(-1, self.block_size).float()
        by_slot[:, 0] = 1  # known, or decided by the row before it
        prefix = by_slot.cumprod(1)  # whether all slots up to it are right
        offered = there * prefix.roll(1, dims=1)
        return Agreement(offered.sum(0), (there * prefix).sum(0))


class FrozenHead(torch.autograd.Function):
    """Cross-entropies behind a head that is not trained: `weights` times them summed, each, and
    where the label is the most probable token.

    The gradient of `hidden` is computed on the way, so the logits of at most `ROWS` rows exist, and
    only once.
    """

    ROWS = 1024

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        entropies, right = torch.empty_like(weights), torch.empty_like(weights)
        head = head.to(hidden.dtype)
        for first in range(0, len(labels), FrozenHead.ROWS):
            rows = slice(first, first + FrozenHead.ROWS)
            label = labels[rows, None]
            logits = (hidden[rows] @ head.T).float()
            at_label = logits.gather(1, label)
            largest, best = logits.max(dim=1, keepdim=True)
            right[rows] = (best == label).squeeze(1).float()
            chances = logits.sub_(largest).exp_()
            total = chances.sum(dim=1, keepdim=True)
            entropies[rows] = (total.log() + largest - at_label).squeeze(1)
            if gradient is not None:
                chances.div_(total).scatter_add_(1, label, -torch.ones_like(at_label))
                gradient[rows] = chances.mul_(weights[rows, None]).to(head.dtype) @ head
        context.save_for_backward(gradient)
        context.mark_non_differentiable(entropies, right)
        return (entropies * weights).sum(), entropies, right

    @staticmethod
    def backward(context: Any, loss: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        (gradient,) = context.saved_tensors
        return gradient * loss.to(gradient.dtype), None, None, None
