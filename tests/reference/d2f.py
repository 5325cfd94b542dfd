"""Discrete Diffusion Forcing (D2F, arXiv 2508.09192), uncached.

The prompt sees all of itself; blocks of k tokens follow it, and a row of a block sees the prompt,
the blocks before and all of its own block. Several blocks are decided side by side, as the loop
of zhijie-group/Discrete-Diffusion-Forcing has it (D2F-eval/eval_dream.py, eval_llada.py:
_generate_block_single), step by step:

 1. Append a block of masks if one is left to add, no EOS has been decided, and the share of
    decided positions of the last block is >= `block_add_threshold`. The prompt's share is 1.
 2. A block is activated, for good, once that share of the block before it is >=
    `decoded_token_threshold`; so may be the one just appended.
 3. Stop if every token of the text is decided (with `run_out`: if there is no mask).
 4. One forward over everything that is not cached: the blocks to cache, then the active ones.
 5. In each active block decide the masked positions whose best token has a probability >
    `skip_threshold`; an activated block in which there is none decides its most probable one.
    They all read the logits of this one forward.
 6. A block without masks is to be cached with the next forward, in ascending order and only while
    no block before it is active; until then it stays active and is computed again.

Why this needs no cache to be exact: a block is cached in a forward that sees its final tokens, and
its rows see only the prompt, blocks cached before or with it, and itself, all of them final. So
its keys and values are those of any later forward over the whole sequence with the same per-row
visibility, and a finished block that waits is no different.

The same holds for shifted logits (Dream), where position i reads row i - 1. That row is in the
same forward, as an active row or the last row to cache; or it is the last row of the newest cached
block, and its logits were kept from the forward that cached it. A cached row sees nothing that
changes afterwards, so these are the logits that row has in any later forward.

Ours: blocks for all the tokens wanted, the last cut off afterwards (the public code drops a
remainder); fewer rows only where the context ends; the mask token is barred; statistics in float64
(the public code's softmax is bfloat16); no forward once every position is decided up to the first
EOS or to the last token wanted, whichever comes first. The public code goes on until no mask is
left, which changes nothing in the text (`run_out`). A decided EOS stops the appending wherever it
is, also behind the tokens wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .decoders import Decision, Decoded, Forward, tokens_wanted
from .stats import row_stats


@dataclass
class Block:
    start: int
    stop: int
    state: str = "active"  # then "to cache", then "cached"
    activated: bool = False


class D2f(NamedTuple):
    decoded: Decoded
    rows: list[tuple[int, int]]  # of each forward: rows whose keys and values are kept, others


def d2f_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    block_size: int,
    mask_id: int,
    eos_ids: Collection[int] = (),
    *,
    block_add_threshold: float = 0.1,
    decoded_token_threshold: float = 0.95,
    skip_threshold: float = 0.9,
    logit_shift: int = 0,
    ignore_eos: bool = False,
    n_ctx: int | None = None,
    run_out: bool = False,
) -> D2f:
    """Greedy D2F. Each forward decides at least one token, so the NFE is their number."""
    length = len(prompt) + tokens_wanted(prompt, max_tokens, n_ctx)
    ends_text = set() if ignore_eos else set(eos_ids)
    canvas = list(prompt)
    blocks = [Block(0, len(prompt), state="to cache", activated=True)]
    eos_decided = False
    trace: list[Decision] = []
    rows: list[tuple[int, int]] = []

    def masked(block: Block) -> list[int]:
        positions = range(max(block.start, len(prompt)), block.stop)
        return [i for i in positions if canvas[i] == mask_id]

    def ratio(block: Block) -> float:
        size = block.stop - block.start
        return (size - len(masked(block))) / size

    def text_is_decided() -> bool:
        for i in range(len(prompt), min(len(canvas), length)):
            if canvas[i] == mask_id:
                return False
            if canvas[i] in ends_text:
                return True
        return len(canvas) >= length

    while True:
        last = blocks[-1]
        if ratio(last) >= block_add_threshold and last.stop < length and not eos_decided:
            stop = min(last.stop + block_size, n_ctx or last.stop + block_size)
            blocks.append(Block(last.stop, stop))
            canvas += [mask_id] * (stop - last.stop)
        for before, block in pairwise(blocks):
            block.activated |= ratio(before) >= decoded_token_threshold
        if not any(masked(block) for block in blocks) or (text_is_decided() and not run_out):
            break

        kv_end = np.concatenate([np.full(b.stop - b.start, b.stop) for b in blocks])
        logits = model.forward(canvas, kv_end)
        to_cache = [b for b in blocks if b.state == "to cache"]
        active = [b for b in blocks if b.state == "active"]
        kept, dropped = (sum(b.stop - b.start for b in part) for part in (to_cache, active))
        rows.append((kept, dropped))
        for block in to_cache:
            block.state = "cached"

        decided: list[int] = []
        margin = float("inf")
        for block in active:
            positions = masked(block)
            if not positions:
                continue
            stats = row_stats(logits[np.array(positions) - logit_shift], mask_id)
            chosen = np.flatnonzero(stats.top_prob > skip_threshold)
            margin = min(margin, float(np.abs(stats.top_prob - skip_threshold).min()))
            if len(chosen) == 0 and block.activated:
                chosen = stats.top_prob.argmax(keepdims=True)  # ties: lowest position
                best = np.sort(stats.top_prob)[-2:]
                margin = min(margin, float(best[-1] - best[0]) if len(best) > 1 else margin)
            for i in chosen:
                canvas[positions[i]] = int(stats.argmax[i])
                decided.append(positions[i])
                margin = min(margin, float(stats.logit_gap[i]))
        trace.append(Decision(decided, [canvas[i] for i in decided], margin))
        eos_decided |= any(canvas[i] in ends_text for i in decided)
        for block in active:
            if masked(block):
                break
            block.state = "to cache"

    tokens = canvas[len(prompt) : length]
    eos = next((i for i, token in enumerate(tokens) if token in ends_text), None)
    if eos is None:
        return D2f(Decoded(tokens, len(trace), "length", trace), rows)
    return D2f(Decoded(tokens[: eos + 1], len(trace), "stop", trace), rows)
