"""The public block-diffusion families as settings of one uncached decoder.

Text is decoded block by block. A block starts as masks, forwards decide some of them each, and a
finished block is kept as its family runs it for its keys and values. Each forward recomputes the
whole sequence, every row with the visibility it has when it is cached; a cached row sees only
what is final, so that is the same.

What a family chooses is in `Settings`. Where public implementations differ the option is named
and the published default is the default. Temperature 0 alone: tokens are argmaxes, confidences
untempered.

What the public code does, and where this file differs (each time where it says "ours"):

Nemotron-Labs-Diffusion (nvidia/Nemotron-Labs-Diffusion-8B: modeling file and its
generate_with_prefix_cache_block_diff). Prompt and finished blocks causal; slot 0 of a block is
NTP's token from the last causal row; each forward reveals the best mask and every one with
confidence >= 0.9; stops once an EOS has no mask before it. It counts the causal forward of every
block as an NFE, the last one's too, but not the prompt's. Ours: forwards that decide a token, so
the prompt's (it seeds) and every block's but the last. It runs one more forward behind a seed that
is an EOS; ours stops. It wants lengths that are multiples of the block; ours cuts. Others: all
masks and no seed (vllm:vllm/model_executor/models/nemotron_dllm.py, which also bars the mask
token), threshold > instead of >= (SGLang): the same but at exact equality; here it is >.

SDAR (JetAstra/SDAR:generate.py, block_diffusion_generate). Blocks at absolute multiples, the
prompt's last P mod B tokens open the first one; block-causal prompt; finished blocks run once
more, bidirectional inside. With n = B / steps per forward (remainder first): dynamic reveals the
masks with confidence > 0.85 if there are n, else the best n. steps = B by default. Where fewer
than n masks are left, its static and dynamic rules also overwrite decided tokens; ours never
does. Its entropy_bounded takes the entropy of one probability; ours is SBD's rule. It ends after
a block with a stop id among the new tokens, decided to its end. LMDeploy takes >= 0.85, SGLang
> 0.95. It samples at temperature 1 unless told otherwise.

Fast-dLLM v2 (Efficient-Large-Model/Fast_dLLM_v2_7B: modeling.py, generate). As SDAR's blocks, but
logits are shifted: position i reads row i - 1 of the block, so slot 0 must not be a mask: it is a
token of the prompt, or NTP's token from the last row of the block (or prompt) before. Sub-blocks
of 8 are decided left to right, each forward over all rows of the block. Confidence > threshold or
best; threshold 1 in generate, that is one at a time, 0.9 in the model card's example, 0.95 in the
batch sampler. A prompt of exactly one block is lost there (it prefills only P > B); ours prefills
it. Stops once an EOS has no mask before it.

LLaDA (ML-GSAI/LLaDA:generate.py). Nothing is cached: every forward runs the prompt and all the
tokens wanted, and all rows see all. The masks of a block are split evenly over its steps
(remainder first), the best ones by probability. 128 steps for 128 tokens. No stop at EOS; the
output is cut there. Ours: the last block is shorter where the block does not divide the length.

Dream (DreamLM/Dream; generation_utils.py as in
zhijie-group/Discrete-Diffusion-Forcing:D2F-eval/model_cache/dream/). As LLaDA in one block of the
whole length, with logits shifted. Times t from 1 to 0.001; step i of `steps` decides
floor(masks * (1 - t[i+1] / t[i])) masks, the best by confidence (maskgit_plus), by margin
(topk_margin) or by least entropy (entropy), and all that are left at the last step; `origin`
decides each mask with that probability instead. It takes the floor in float32, ours in float64.
512 steps, `origin`. Steps that decide nothing change nothing; ours do not run a forward.

In all of these a mask behind a decided EOS is one like any other: it may be decided, and those in
front of it see that. The end `cut` leaves it a mask, as set-block decoding does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .decoders import Decision, Decoded, Forward, tokens_wanted
from .stats import RowStats, row_stats
from .unmask import Rule, choose

SMALLEST_TIME = 1e-3
ORDERS: dict[str, Callable[[RowStats], NDArray[np.float64]]] = {  # ascending: the best come first
    "confidence": lambda stats: -stats.top_prob,
    "margin": lambda stats: -stats.margin,
    "entropy": lambda stats: stats.entropy,
}


@dataclass(frozen=True)
class Settings:
    """A family. Its words are those of the model file's metadata."""

    block_size: int | None  # None: all the tokens wanted
    logit_shift: int = 0  # 1: position i reads the logits of row i - 1
    prompt_attention: str = "causal"  # or bidirectional, block_causal
    block_origin: str = "prompt"  # or absolute
    commit_attention: str = "causal"  # or block, none: every row sees all, always
    seed_slot: bool = False  # slot 0 is NTP's token from the last row before the block
    # confidence: those above `threshold`, at least the best; rule: any of set-block decoding's;
    # dynamic, static, sequential: by a number for each step; schedule, origin: by Dream's times.
    unmask: str = "confidence"
    threshold: float = 0.9
    order: str = "confidence"  # or margin, entropy
    rule: Rule = field(default_factory=Rule)
    steps: int | None = None  # per block; None: as many as it has rows
    sub_block_size: int | None = None  # None: the block
    # When the text ends early: eos, at an EOS with no mask before it; block, behind a block that
    # has an EOS; none, never. cut, as set-block decoding: as eos, and what is behind a decided EOS
    # is not decided any more.
    end: str = "eos"


NEMOTRON = Settings(block_size=32, seed_slot=True)
SDAR = Settings(
    block_size=4,
    prompt_attention="block_causal",
    block_origin="absolute",
    commit_attention="block",
    unmask="dynamic",
    threshold=0.85,
    end="block",
)
FAST_DLLM_V2 = Settings(
    block_size=32,
    logit_shift=1,
    prompt_attention="block_causal",
    block_origin="absolute",
    commit_attention="block",
    seed_slot=True,
    threshold=1.0,
    sub_block_size=8,
)
LLADA = Settings(block_size=128, commit_attention="none", unmask="static", end="none")
DREAM = Settings(
    block_size=None,
    logit_shift=1,
    commit_attention="none",
    unmask="origin",
    steps=512,
    end="none",
)


def visible(settings: Settings, n: int, first: int, start: int) -> NDArray[np.int64]:
    """kv_end of n rows: a prompt up to `first`, finished blocks from there, one block at `start`.

    The n rows end with that block; start = n where there is none.
    """
    if settings.commit_attention == "none":
        return np.full(n, n)
    rows = np.arange(n)
    size = settings.block_size or n

    def block_end(origin: int) -> NDArray[np.int64]:
        return origin + ((rows - origin) // size + 1) * size

    prompt = {
        "causal": rows + 1,
        "bidirectional": np.full(n, first),
        "block_causal": np.minimum(block_end(0), first),
    }[settings.prompt_attention]
    finished = {"causal": rows + 1, "block": block_end(first)}[settings.commit_attention]
    return np.where(rows >= start, n, np.where(rows < first, prompt, finished))


def best(stats: RowStats, n: int, order: str) -> tuple[list[int], float]:
    """The n best rows in `order`, ascending, and the gap to the next; ties: lower position."""
    key = ORDERS[order](stats)
    ranking = np.argsort(key, kind="stable")
    gap = key[ranking[n]] - key[ranking[n - 1]] if n < len(key) else np.inf
    return sorted(int(i) for i in ranking[:n]), float(gap)


def choose_for(settings: Settings, stats: RowStats, n: int) -> tuple[list[int], float]:
    """Which candidates a forward decides, ascending, and the margin of that choice.

    `n` is how many the step gives: the number for static (the best), sequential (the first) and
    schedule (the best in `order`), all for origin, the least number for dynamic: where those above
    the threshold are fewer, it takes the best n instead.
    """
    if settings.unmask == "rule":
        return choose(stats, settings.rule)
    if settings.unmask == "confidence":
        return choose(stats, Rule("confidence", confidence_threshold=settings.threshold))
    if settings.unmask in ("sequential", "origin"):
        return list(range(n)), np.inf
    if settings.unmask in ("static", "schedule"):
        return best(stats, n, settings.order)
    margin = float(np.abs(stats.top_prob - settings.threshold).min())
    sure = [int(i) for i in np.flatnonzero(stats.top_prob > settings.threshold)]
    chosen, gap = best(stats, n, "confidence")
    return (sure, margin) if len(sure) >= n else (chosen, min(margin, gap))


def time_share(step: int, steps: int) -> float:
    """The share of the masks that Dream's step decides: 1 - t[step + 1] / t[step], 1 at last."""
    if step >= steps - 1:
        return 1.0
    time, after = (1 - (1 - SMALLEST_TIME) * s / steps for s in (step, step + 1))
    return 1 - after / time


def family_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    mask_id: int,
    eos_ids: Collection[int],
    settings: Settings,
    *,
    ignore_eos: bool = False,
    n_ctx: int | None = None,
    draw: Callable[[int, int], float] | None = None,
) -> Decoded:
    """Greedy decoding of one family.

    Blocks keep all their rows, fewer only where the context ends; masks behind the tokens wanted
    are never decided. With nothing cached the rows are the prompt and the tokens wanted. `draw`
    is `origin`'s: a number in [0, 1) for a step and a position.

    The NFE counts the forwards that decide a token: those that unmask, and with `seed_slot` those
    over the prompt and over a finished block that another one follows. Without it a finished
    block runs in front of the next one's first forward, and costs none.
    """
    length = len(prompt) + tokens_wanted(prompt, max_tokens, n_ctx)
    ends_text = set() if ignore_eos else set(eos_ids)
    size = settings.block_size or length - len(prompt)
    whole = settings.commit_attention == "none"
    canvas = [*prompt, *[mask_id] * (length - len(prompt) if whole else 0)]
    trace: list[Decision] = []
    first = len(prompt)
    if settings.block_origin == "absolute":
        first -= first % size

    def decide(positions: list[int], stats: RowStats, chosen: list[int], margin: float) -> None:
        for i in chosen:
            canvas[positions[i]] = int(stats.argmax[i])
        margin = min(margin, float(stats.logit_gap[chosen].min()))
        where = [positions[i] for i in chosen]
        trace.append(Decision(where, [canvas[i] for i in where], margin))

    def logits_of(positions: list[int], start: int, stop: int) -> NDArray[np.float64]:
        """Of masked positions in the block [start, stop)."""
        n = length if whole else stop
        rows = np.array(positions) - settings.logit_shift
        last = n - int(rows[0])
        logits = model.forward(canvas[:n], visible(settings, n, first, start), last=last)
        return logits[rows - rows[0]]

    def new_positions(start: int, stop: int) -> range:
        return range(max(start, len(prompt)), min(stop, length))

    def stopped(start: int, stop: int) -> bool:
        for i in new_positions(start, stop):
            if canvas[i] == mask_id and settings.end in ("eos", "cut"):
                return False
            if canvas[i] in ends_text:
                return settings.end != "none"
        return False

    start, ended = first, False
    while start < length and not ended:
        stop = min(start + size, length if whole else n_ctx or start + size)
        canvas += [mask_id] * (stop - len(canvas))
        if settings.seed_slot and start >= len(prompt):
            kv_end = visible(settings, start, first, start)
            stats = row_stats(model.forward(canvas[:start], kv_end, last=1), mask_id)
            decide([start], stats, [0], np.inf)
        steps = settings.steps or size
        step = 0
        while True:
            masked = [i for i in new_positions(start, stop) if canvas[i] == mask_id]
            if settings.end == "cut":
                eos = (i for i in new_positions(start, stop) if canvas[i] in ends_text)
                end = next(eos, stop)
                masked = [i for i in masked if i < end]
            if not masked or (settings.end in ("eos", "cut") and stopped(start, stop)):
                break
            sub_block = settings.sub_block_size or size
            end = masked[0] + sub_block - (masked[0] - start) % sub_block
            masked = [i for i in masked if i < end]
            n = len(masked)
            if settings.unmask == "schedule":
                n = int(n * time_share(step, steps))
            elif settings.unmask == "origin":
                if draw is None:
                    raise ValueError("expected draw with origin")
                share = time_share(step, steps)
                masked = [i for i in masked if draw(step, i) < share]
                n = len(masked)
            elif settings.unmask in ("static", "sequential", "dynamic"):
                n = min(n, size // steps + (step < size % steps))
            step += 1
            if n > 0:
                stats = row_stats(logits_of(masked, start, stop), mask_id)
                decide(masked, stats, *choose_for(settings, stats, n))
        ended = stopped(start, stop)
        start = stop

    tokens = canvas[len(prompt) : length]
    eos = next((i for i, token in enumerate(tokens) if token in ends_text), None)
    if eos is None:
        return Decoded(tokens, len(trace), "length", trace)
    return Decoded(tokens[: eos + 1], len(trace), "stop", trace)
