"""The token that a row draws, in float64: filters, rules, and Gumbel-max with counted noise.

The noise of the token at a position is a function of (seed, sample index, position - 1, 0, token)
alone: of next-token decoding's row, and of whatever row decides that position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .decoders import Forward, tokens_wanted
from .model import causal

Array = NDArray[np.float64]
_BITS = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


def mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _BITS
    return x ^ (x >> 31)


def combine(key: int, value: int) -> int:
    return mix((key + _STEP + mix((value + _STEP) & _BITS)) & _BITS)


def gumbel(sampling: Sampling, position: int, vocab_size: int) -> Array:
    """Noise of every token at `position`: u is the centre of one of 2^23 parts of (0, 1)."""
    key = combine(combine(sampling.seed, sampling.sample_index), position - 1)
    key = combine(key, 0)
    u = np.array([((combine(key, token) >> 41) + 0.5) / 2**23 for token in range(vocab_size)])
    return -np.log(-np.log(u))


def adjusted(
    logits: Array, sampling: Sampling, prompt: Sequence[int], text: Sequence[int]
) -> Array:
    """Bias; repetition over prompt and text; then presence and frequency over the text."""
    logits = np.array(logits, dtype=np.float64)
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *text}:
        by = sampling.repetition_penalty
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
    for token, count in Counter(text).items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return logits


def draw(logits: Array, sampling: Sampling, position: int) -> tuple[int, float]:
    """The token, and by how little it is that one: a gap of scores, or how near a filter's edge a
    token lies whose side of it decides."""
    if sampling.temperature == 0:
        order = np.argsort(-logits, kind="stable")
        return int(order[0]), float(logits[order[0]] - logits[order[1]])
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    edge = np.full(len(order), np.inf)  # below 0: left out
    if sampling.top_k:
        rank = np.arange(len(order))
        last, first = scaled[order[sampling.top_k - 1]], scaled[order[sampling.top_k]]
        edge = np.where(rank < sampling.top_k, scaled[order] - first, scaled[order] - last)
        edge[rank >= sampling.top_k] = np.minimum(edge[rank >= sampling.top_k], -1e-300)
        weights = np.where(rank < sampling.top_k, weights, 0.0)
    if sampling.top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
        edge = np.minimum(edge, sampling.top_p - before)
        weights = np.where(before < sampling.top_p, weights, 0.0)
    if sampling.min_p > 0:
        relative = np.exp(scaled[order] - scaled[order[0]])
        edge = np.minimum(edge, relative - sampling.min_p)
    scores = (scaled + gumbel(sampling, position, len(logits)))[order]
    kept = edge >= 0
    kept[0] = True  # the most probable one always is
    best = int(np.argmax(np.where(kept, scores, -np.inf)))
    margin = float(edge[best]) if best > 0 else np.inf
    rivals = np.delete(np.arange(len(order)), best)
    # One that is kept may score as much; one that is left out and scores more may be kept.
    margin = min(margin, *(scores[best] - scores[i] for i in rivals if kept[i]), np.inf)
    margin = min(
        margin, *(-edge[i] for i in rivals if not kept[i] and scores[i] > scores[best]), np.inf
    )
    return int(order[best]), margin


def sampled_ntp_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int] = (),
    *,
    mask_id: int,
    ignore_eos: bool = False,
) -> tuple[list[int], list[float]]:
    """Uncached next-token decoding: the tokens, and the margin of each."""
    text: list[int] = []
    margins: list[float] = []
    for _ in range(tokens_wanted(prompt, max_tokens, None)):
        ids = [*prompt, *text]
        logits = model.forward(ids, causal(len(ids)), last=1)[0]
        logits = adjusted(logits, sampling, prompt, text)
        logits[mask_id] = -np.inf
        token, margin = draw(logits, sampling, len(ids))
        text.append(token)
        margins.append(margin)
        if token in eos_ids and not ignore_eos:
            break
    return text, margins


def sure_tokens(margins: Sequence[float], least: float) -> int:
    """How many tokens come before the first that is not sure."""
    return next((i for i, margin in enumerate(margins) if margin < least), len(margins))
