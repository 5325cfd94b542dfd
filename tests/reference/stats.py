"""What a decoder wants to know of a row of logits, and the distribution a sampled token follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RowStats:
    """Statistics of n rows, each array [n]. The mask token is left out of all of them."""

    argmax: NDArray[np.int64]  # ties: lowest id
    top_prob: Array
    margin: Array  # probability of the first minus that of the second
    log_z: Array  # log sum exp(logit)
    entropy: Array  # nats, 0 log 0 = 0
    logit_gap: Array  # logit of the first minus that of the second: how safe the argmax is


def log_softmax(logits: NDArray[np.floating[Any]]) -> Array:
    """Log-probabilities of each row of `logits` [n, vocab], the mask token's among them."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


def row_stats(logits: Array, mask_id: int | None) -> RowStats:
    """Statistics of each row of `logits` [n, vocab], the mask token's logit being -inf first."""
    logits = _without_mask(logits, mask_id)
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - top
    weights = np.exp(shifted)
    z = weights.sum(axis=-1)
    # H = log z - sum w s / z, w = exp(s); the product is 0 where s is -inf
    terms = weights * np.where(weights > 0, shifted, 0.0)
    entropy = np.maximum(np.log(z) - terms.sum(axis=-1) / z, 0.0)
    second, first = np.sort(shifted, axis=-1)[:, -2:].T  # first is 0
    return RowStats(
        argmax=logits.argmax(axis=-1),
        top_prob=1.0 / z,
        margin=(1.0 - np.exp(second)) / z,
        log_z=top[:, 0] + np.log(z),
        entropy=entropy,
        logit_gap=first - second,
    )


def filtered_distribution(
    logits: Array, temperature: float, top_k: int, top_p: float, mask_id: int | None
) -> Array:
    """Probabilities [vocab] of one row's sampled token: temperature, then top-k, then top-p.

    Each filter renormalises what it leaves. `top_k` 0 keeps all. `top_p` keeps the smallest set of
    most probable tokens whose probabilities add up to at least `top_p`. Among equals the lower id
    counts as more probable. Temperature 0 puts everything on the argmax.
    """
    logits = _without_mask(logits, mask_id)
    if temperature == 0.0:
        top_k, temperature = 1, 1.0
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        cumulated = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(cumulated, top_p, side="left")) + 1]
    probabilities: Array = np.zeros(len(weights))
    probabilities[order] = weights[order] / weights[order].sum()
    return probabilities


def _without_mask(logits: Array, mask_id: int | None) -> Array:
    logits = np.array(logits, dtype=np.float64)
    if mask_id is not None:
        logits[..., mask_id] = -np.inf
    return logits
