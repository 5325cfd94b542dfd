"""Lossless set-block decoding, uncached: blocks as drafts, kept as far as greedy NTP agrees.

The commit of a decided block is a causal forward over its tokens, so it also says what greedy
next-token prediction (NTP) would have chosen at each of its positions, and it shares its forward
with the next block's first one:

    first forward of a block:  [what the cache lacks, causal, kept][k masks, block]
    later forwards:            [block, block]

What the cache lacks is the prompt, or the draft (the block decided before, to be verified), or the
one token that NTP put in a draft's place. Its last row says what NTP chooses for the block's first
position: that token is put there after the block's first forward, in which it still was a mask,
and no rule chooses it. The others are unmasked as in plain set-block decoding, up to and including
the first EOS or the last token wanted. Then the draft is verified, from left to right:

- Its first token is NTP's own. NTP's choice for token j > 0 comes from the row of token j - 1.
- All agree: the draft is text, and what was unmasked in the forward that verified it stands.
- First mismatch at m: tokens [0, m) are text, and so is NTP's token at m, known before its own row
  has run. Keys and values are cut back to m, what was unmasked in that forward is dropped, and the
  next block starts behind NTP's token, which runs causally in front of it.
- A draft that would end the text is verified alone, as nothing comes after it. Its last row would
  say what comes behind the text, and is not run.

A token of NTP's ends the text as soon as it is known, if it is an EOS or the last one wanted.
Every forward counts in the NFE: each decides something, in the text or in a block. The tokens are
those of greedy NTP whatever rule unmasks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from .decoders import Decision, Decoded, Forward, tokens_wanted
from .model import causal, with_block
from .stats import RowStats, row_stats
from .unmask import Rule, choose


class Lossless(NamedTuple):
    decoded: Decoded
    accepted: list[int]  # for each verified draft: its tokens before the first mismatch


def sbd_lossless_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    block_size: int,
    mask_id: int,
    eos_ids: Collection[int] = (),
    *,
    ignore_eos: bool = False,
    n_ctx: int | None = None,
    **rule: Any,
) -> Lossless:
    """Greedy NTP's text by verified set blocks; `rule` are an unmasking `Rule`'s parameters."""
    unmask = Rule(**rule)
    barred = mask_id if mask_id >= 0 else None  # below 0: a mask that is no token
    length = len(prompt) + tokens_wanted(prompt, max_tokens, n_ctx)
    ends_text = set() if ignore_eos else set(eos_ids)
    text = list(prompt)
    draft: list[int] = []  # follows `text`; decided, to be verified
    trace: list[Decision] = []
    accepted: list[int] = []

    def verdict(ntp: RowStats) -> Decision:
        """What `draft` becomes: its tokens while NTP chooses the same, then NTP's one."""
        m = next((j for j, token in enumerate(draft) if token != ntp.argmax[j]), len(draft))
        accepted.append(m)
        tokens = [int(token) for token in ntp.argmax[: min(m + 1, len(draft))]]
        positions = list(range(len(text), len(text) + len(tokens)))
        return Decision(positions, tokens, float(ntp.logit_gap[: len(tokens)].min()))

    while len(text) < length and not (len(text) > len(prompt) and text[-1] in ends_text):
        start = len(text) + len(draft)
        rows = block_size if n_ctx is None else min(block_size, n_ctx - start)
        block = [mask_id] * rows
        ids = [*text, *draft, *block]
        logits = model.forward(ids, with_block(len(ids), rows), last=len(draft) + 1 + rows)
        ntp = row_stats(logits[: len(draft) + 1], barred)  # row j chooses what follows j tokens
        if draft:
            verified = verdict(ntp)
            agrees = verified.tokens == draft
            text += verified.tokens
            draft = []
            if not agrees:
                trace.append(verified)
                continue

        first = int(ntp.argmax[-1])
        trace.append(Decision([start], [first], float(ntp.logit_gap.min())))
        if first in ends_text or start + 1 == length:
            text.append(first)
            break
        shared = logits[-rows:]  # the block's part of its first forward
        while True:
            eos = next((i for i, token in enumerate(block) if token in ends_text), rows)
            end = min(eos + 1, length - start, rows)
            masked = [i for i in range(1, end) if block[i] == mask_id]
            if not masked:
                break
            if shared is not None:
                decided, margin, logits, shared = [0], trace.pop().margin, shared, None
            else:
                decided, margin = [], float("inf")
                logits = model.forward(text + block, with_block(start + rows, rows), last=rows)
            stats = row_stats(logits[masked], barred)
            chosen, certainty = choose(stats, unmask)
            block[0] = first
            for i in chosen:
                block[masked[i]] = int(stats.argmax[i])
                decided.append(masked[i])
            margin = min(margin, certainty, float(stats.logit_gap[chosen].min()))
            trace.append(
                Decision([start + i for i in decided], [block[i] for i in decided], margin)
            )

        block[0] = first
        draft = block[:end]
        if eos < rows or start + end == length:
            ids = text + draft[:-1]
            stats = row_stats(model.forward(ids, causal(len(ids)), last=end), barred)
            trace.append(verdict(stats))
            text += trace[-1].tokens
            draft = []
    reason = "stop" if text[-1] in ends_text else "length"
    return Lossless(Decoded(text[len(prompt) :], len(trace), reason, trace), accepted)
