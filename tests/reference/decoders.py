"""Uncached greedy decoders, next-token (NTP) and set-block (SBD, arXiv 2509.04185, Alg. 2 and 3).

Every forward recomputes the whole sequence: [prompt and decided tokens, causal][current block,
bidirectional]. So nothing here can be wrong about what a cache holds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .model import causal, with_block
from .stats import RowStats, filtered_distribution, row_stats
from .unmask import Rule, choose

__all__ = [
    "Decision",
    "Decoded",
    "Forward",
    "RowStats",
    "filtered_distribution",
    "ntp_decode",
    "row_stats",
    "sbd_decode",
    "tokens_wanted",
]


class Forward(Protocol):
    """What the decoders need of a model: `ReferenceModel`, or a script of logits in a test."""

    def forward(
        self, ids: Sequence[int], kv_end: NDArray[np.int64], last: int | None = None
    ) -> NDArray[np.float64]: ...


class Decision(NamedTuple):
    """What one forward decided."""

    positions: list[int]  # absolute, ascending
    tokens: list[int]  # at those positions
    margin: float  # least change of a logit, probability or entropy sum that could alter this


class Decoded(NamedTuple):
    tokens: list[int]  # new tokens, a closing EOS included
    nfe: int  # forwards that decided at least one token
    finish_reason: str  # "stop" at an EOS, else "length"
    trace: list[Decision]  # one per forward

    @property
    def margin(self) -> float:
        """The least of the trace: a decoder exact to less than this must decode the same."""
        return min((decision.margin for decision in self.trace), default=float("inf"))


def ntp_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    eos_ids: Collection[int] = (),
    ignore_eos: bool = False,
    n_ctx: int | None = None,
    mask_id: int | None = None,
) -> Decoded:
    """Greedy next-token decoding: one token per causal forward, at positions below `n_ctx`."""
    wanted = tokens_wanted(prompt, max_tokens, n_ctx)
    text = list(prompt)
    trace: list[Decision] = []
    while len(text) < len(prompt) + wanted:
        stats = row_stats(model.forward(text, causal(len(text)), last=1), mask_id)
        token = int(stats.argmax[0])
        trace.append(Decision([len(text)], [token], float(stats.logit_gap[0])))
        text.append(token)
        if token in eos_ids and not ignore_eos:
            return Decoded(text[len(prompt) :], len(trace), "stop", trace)
    return Decoded(text[len(prompt) :], len(trace), "length", trace)


def sbd_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    block_size: int,
    mask_id: int,
    eos_ids: Collection[int] = (),
    *,
    unmask: str = "entropy_bounded",
    gamma: float = 0.35,
    proxy: str = "entropy",
    factor: float = 1.0,
    confidence_threshold: float = 0.9,
    top_n: int = 1,
    ignore_eos: bool = False,
    n_ctx: int | None = None,
) -> Decoded:
    """Greedy set-block decoding.

    A block has `block_size` rows, fewer only where the context ends, all masked at first. After
    each forward a rule picks some of the masked positions before `end`, and those take their
    argmax. `end` counts from the block's start and is looked up before each choice:

        end = min(first decided EOS + 1, tokens still wanted, rows of the block)

    so it shrinks once an EOS is decided, and again if a later forward decides one further left.
    Positions from `end` on stay as they are, masked or decided, and are still attended to. When
    every position before `end` is decided, these are the block's text; it is the last block if it
    holds an EOS or completes the tokens wanted.
    """
    rule = Rule(unmask, gamma, proxy, factor, confidence_threshold, top_n)
    wanted = tokens_wanted(prompt, max_tokens, n_ctx)
    ends_text = set() if ignore_eos else set(eos_ids)
    text = list(prompt)
    trace: list[Decision] = []
    while (left := len(prompt) + wanted - len(text)) > 0:
        start = len(text)
        rows = block_size if n_ctx is None else min(block_size, n_ctx - start)
        block = [mask_id] * rows
        while True:  # one forward each
            eos = next((i for i, token in enumerate(block) if token in ends_text), rows)
            end = min(eos + 1, left, rows)
            masked = [i for i in range(end) if block[i] == mask_id]
            if not masked:
                break
            logits = model.forward(text + block, with_block(start + rows, rows), last=rows)
            stats = row_stats(logits[masked], mask_id)
            chosen, margin = choose(stats, rule)
            for i in chosen:
                block[masked[i]] = int(stats.argmax[i])
            positions = [masked[i] for i in chosen]
            trace.append(
                Decision(
                    [start + i for i in positions],
                    [block[i] for i in positions],
                    min(margin, float(stats.logit_gap[chosen].min())),
                )
            )
        text += block[:end]
        if eos < end:
            return Decoded(text[len(prompt) :], len(trace), "stop", trace)
    return Decoded(text[len(prompt) :], len(trace), "length", trace)


def tokens_wanted(prompt: Sequence[int], max_tokens: int, n_ctx: int | None) -> int:
    """New tokens that both `max_tokens` and the context allow."""
    if not prompt or max_tokens < 1:
        raise ValueError(f"expected a prompt and max_tokens >= 1, got {len(prompt)}, {max_tokens}")
    if n_ctx is None:
        return max_tokens
    if len(prompt) > n_ctx:
        raise ValueError(f"expected a prompt of at most {n_ctx} tokens, got {len(prompt)}")
    return min(max_tokens, n_ctx - len(prompt))
