"""The Set Block Decoding objective (Gat et al., arXiv 2509.04185, eq. 14).

One forward over the doubled sequence `[x ; x_hat]` trains both jobs of the network. `x` (L clean
tokens) is read causally and gives the next-token loss. `x_hat` is `x` cut to whole blocks of
`block_size`, some tokens replaced by the mask token; its block b reads the clean tokens of the
blocks before b and all of itself, and gives the loss of its masked positions, each *at that same
position*. Both halves carry the positions 0, 1, 2, ...; the keys a row sees tell them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Losses(NamedTuple):
    """`total`: eq. 14 per token of x, to minimise. `ntp`, `matp`: its two mean cross-entropies."""

    total: Tensor
    ntp: Tensor
    matp: Tensor


def whole_blocks(length: int, block_size: int) -> int:
    """How many of `length` tokens lie in whole blocks counted from 0."""
    return length // block_size * block_size


def doubled_attention(length: int, block_size: int) -> Tensor:
    """Which keys each row of `[x ; x_hat]` sees: bool [L + N, L + N], N = `whole_blocks(L)`."""
    noisy = whole_blocks(length, block_size)
    is_noisy = torch.arange(length + noisy) >= length
    position = doubled_positions(length, block_size)
    block = position // block_size
    row, key = (slice(None), None), (None, slice(None))
    clean_row = ~is_noisy[row] & ~is_noisy[key] & (position[key] <= position[row])
    past_of_noisy_row = is_noisy[row] & ~is_noisy[key] & (block[key] < block[row])
    own_block = is_noisy[row] & is_noisy[key] & (block[key] == block[row])
    return clean_row | past_of_noisy_row | own_block


def doubled_positions(length: int, block_size: int) -> Tensor:
    """Positions of `[x ; x_hat]`: int64 [L + N]."""
    return torch.cat([torch.arange(length), torch.arange(whole_blocks(length, block_size))])


def draw_masked(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Which tokens of x_hat to mask: bool [B, L]. Each sequence draws its rate eta ~ U(0, 1)."""
    eta = torch.rand(batch, 1, generator=generator)
    return torch.rand(batch, length, generator=generator) < eta


def sbd_loss(
    model: Any, tokens: Tensor, masked: Tensor, block_size: int, mask_token_id: int
) -> Losses:
    """Eq. 14 for `tokens` int64 [B, L] and `masked` bool [B, L], unused past the last whole block.

    `model` is a transformers causal LM: `model.model` gives hidden states, `model.lm_head` logits.
    Only rows with a label meet the head.
    """
    batch, length = tokens.shape
    noisy = whole_blocks(length, block_size)
    if noisy == 0:
        raise ValueError(
            f"block_size is {block_size}, expected at most the {length} tokens of a sequence: "
            "lower it, or lengthen the sequences"
        )
    masked = masked[:, :noisy]
    noisy_tokens = tokens[:, :noisy].masked_fill(masked, mask_token_id)
    attention = _additive(doubled_attention(length, block_size))
    hidden = model.model(
        input_ids=torch.cat([tokens, noisy_tokens], dim=1),
        attention_mask=attention.to(model.device, model.dtype),
        position_ids=doubled_positions(length, block_size)[None].to(tokens.device),
        use_cache=False,
    ).last_hidden_state
    ntp = _cross_entropy_sum(model.lm_head, hidden[:, : length - 1], tokens[:, 1:])
    matp = _cross_entropy_sum(model.lm_head, hidden[:, length:][masked], tokens[:, :noisy][masked])
    return Losses(
        total=(ntp + matp) / tokens.numel(),
        ntp=(ntp / (batch * (length - 1))).detach(),
        matp=(matp / masked.sum().clamp(min=1)).detach(),
    )


def _additive(attends: Tensor) -> Tensor:
    """The mask in the form that every attention of transformers takes: float [1, 1, rows, keys]."""
    return torch.zeros(attends.shape).masked_fill(~attends, -torch.inf)[None, None]


def _cross_entropy_sum(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = lm_head(hidden.reshape(-1, hidden.shape[-1]))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.reshape(-1), reduction="sum")
