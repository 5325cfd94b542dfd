"""Whole generations of random weights on a device: the speedup of Set Block Decoding over
next-token decoding in the engine's own loop, beside what the paper's formula makes of single
forwards.

Random weights cannot decide when to be sure, so `top_n` reveals a fixed number of positions per
forward (replay.py): a block of 16 takes ceil(16 / n) forwards. An average between two such numbers
is a mix of their blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from sbd_engine import SbdError, _core, roofline
from sbd_engine.engine import engine_options
from sbd_engine.random_model import random_model
from sbd_engine.roofline import Work, floor_ms, implied_speedup

REDUCTIONS = (2.2, 3.0, 3.4, 3.9)  # forwards saved by published models: 2.2x to 3.9x
BLOCK = 16
BLOCKS = 16  # decoded by every sequence
_TOP_N = (4, 3, 2)  # 4, 6 and 8 forwards per block
_MASK = 2


class Decoded(NamedTuple):
    tok_s: float  # of all sequences, while all were decoding
    prefill_s: float  # until all of them had read their prompts


def decoding(
    config: Mapping[str, Any],
    dtype: str,
    device: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """By context and batch. What does not run has the reason as "missing": memory
    is too small for many long sequences."""
    for context in contexts:
        n_ctx = context + (BLOCKS + 2) * BLOCK
        settings = engine_options(device, None, n_ctx, "f16")
        core, work = random_model(
            config, dtype, settings, {"sbd.mask_token_id": _MASK, "sbd.block_size": BLOCK}
        )
        for batch in batches:
            at = {"context": context, "batch": batch}
            try:
                yield at | _decode_all(core, work, context, batch, repeats)
            except SbdError as error:
                yield at | {"missing": str(error)}
        del core  # frees its memory before the next


def _decode_all(
    core: _core.Engine, work: Work, context: int, batch: int, repeats: int
) -> dict[str, Any]:
    ntp = decode(core, context, batch, "ntp")
    sbd = {
        -(-BLOCK // n): decode(core, context, batch, "sbd", unmask="top_n", top_n=n) for n in _TOP_N
    }
    samples = core.time_forwards([1, BLOCK, 2 * BLOCK], context, repeats, batch)
    ms = dict(zip((1, BLOCK, 2 * BLOCK), map(median, samples), strict=True))
    machine = roofline.measure(core)
    floors = {rows: floor_ms(work, rows, context, machine, batch) for rows in ms}
    block_s = {forwards: BLOCK / done.tok_s for forwards, done in sbd.items()}
    return {
        "ntp_tok_s": ntp.tok_s,
        "prefill_tok_s": batch * context / median(d.prefill_s for d in (ntp, *sbd.values())),
        "ms": ms,
        "floor_ms": floors,
        "speedups": [
            {
                "reduction": reduction,
                "measured": BLOCK / mixed(block_s, BLOCK / reduction) / ntp.tok_s,
                "formula": implied_speedup(ms, BLOCK, reduction),
                "modelled": implied_speedup(floors, BLOCK, reduction),
            }
            for reduction in REDUCTIONS
        ],
    }


def mixed(block_s: Mapping[int, float], forwards: float) -> float:
    """Seconds per block where blocks of two neighbouring kinds average so many forwards."""
    kinds = sorted(block_s)
    if not kinds[0] <= forwards <= kinds[-1]:
        raise ValueError(f"expected {kinds[0]} to {kinds[-1]} forwards per block, got {forwards}")
    high = next(kind for kind in kinds[1:] if kind >= forwards)
    low = kinds[kinds.index(high) - 1]
    share = (forwards - low) / (high - low)
    return (1 - share) * block_s[low] + share * block_s[high]


def decode(
    core: _core.Engine, context: int, batch: int, decoder: str, **options: int | float | str
) -> Decoded:
    """Decodes BLOCKS blocks behind `context` tokens in each of `batch` sequences. Timed is from
    when all have decided a block until one has all of them."""
    inbox = _core.Inbox(core)
    decided = {inbox.add(_request(context, index, decoder, options)): 0 for index in range(batch)}
    called = time.perf_counter()
    prefill_s = began = at_start = 0.0
    while max(decided.values()) < BLOCKS * BLOCK:
        event = inbox.next()  # of a forward there is one for every sequence
        now = time.perf_counter()
        while event:
            _, revealed, *_ = event.read()
            decided[event.id] += len(revealed)
            event = inbox.next(wait=False)
        if not prefill_s and all(decided.values()):
            prefill_s = now - called
        if not began and min(decided.values()) >= BLOCK:
            began, at_start = now, sum(decided.values())
    return Decoded((sum(decided.values()) - at_start) / (now - began), prefill_s)


def _request(
    context: int, index: int, decoder: str, options: Mapping[str, int | float | str]
) -> _core.Request:
    request = _core.Request()
    request.prompt = [100 + (index + i) % 100 for i in range(context)]
    request.max_tokens = BLOCKS * BLOCK
    request.ignore_eos = True
    request.decoder = decoder
    request.options = dict(options)
    return request
