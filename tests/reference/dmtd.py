"""Direct Multi-Token Decoding (DMTD, arXiv 2510.11958), uncached.

The layers are three runs, encoding E, thinking T and decoding D. For the token x at position i

    e = E(embedding of x)    h = T(e)    z = a e + b h    logits = head(norm(D(z)))

and the logits predict the token at i + 1. The text is cut into cycles of `horizon` tokens. The
first row of a cycle is its head, and of the generated rows only heads have b = 1: the others go
past T. All have a = 1.

Keys and values of T are refilled in cycles: a head runs T over the rows that skipped it since the
head before, and itself, all of them real tokens, causally, and keeps the output of its own row
alone. So when a head is run, T has seen every token up to it, and h of the head is what T gives
when it runs over the whole text: causal rows do not depend on what comes after them, and where a
row's keys and values were computed in one forward or in another makes no difference. e and the
D layers have no gaps, and a row's z is never changed once it has run. Hence one causal forward
over the whole text with the right (a, b) in each row gives the logits that every row had when it
was decoded. That is what this file does.

Coefficients of the prompt's rows, by prompt rule:

    all_heads  (1, 1)  the released inference
    plain      (0, 1)  the ordinary stack of all layers; the author's vLLM fork
    train      (1, b)  b = 1 where i % horizon == 0: the training forward

Heads of the generated rows are at prompt length + j * horizon, for `train` at absolute multiples
of the horizon. The first token comes from the prompt's last row with that row's coefficients, and
its own row, at position prompt length, is the first head (for `train` where it is a multiple).
With horizon 1 every row has (1, 1), which is not the plain model.

Seen in public code: luoxuan-cs/vllm-pDMTD:tests/v1/dmtd/test_dmtd_qwen3.py has the same heads
after the prompt and the same refilling (with horizon 4 and a prompt of 6: head 6 alone, then rows
7 to 10 for head 10), and knows no encoding layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .decoders import Decision, Decoded, tokens_wanted
from .stats import row_stats

Array = NDArray[np.float64]
PROMPT_RULES = ("all_heads", "plain", "train")


class SplitForward(Protocol):
    """What the decoder needs of a model: `ReferenceModel`, or a script in a test."""

    def forward_split(
        self, ids: Sequence[int], split: Sequence[int], a: Array, b: Array, last: int | None = None
    ) -> Array: ...


class Dmtd(NamedTuple):
    decoded: Decoded
    thinking_forwards: int  # through T: the prompt's, and one for each head
    decoding_forwards: int  # through D: one a token, the prompt's included


def coefficients(
    n: int, prompt_length: int, horizon: int, prompt_rule: str = "all_heads"
) -> tuple[Array, Array]:
    """(a, b), each [n], of the rows 0 .. n - 1."""
    if prompt_rule not in PROMPT_RULES:
        names = ", ".join(PROMPT_RULES)
        raise ValueError(f"expected prompt_rule in {names}, got {prompt_rule!r}")
    rows = np.arange(n)
    in_prompt = rows < prompt_length
    origin = 0 if prompt_rule == "train" else prompt_length
    head = (rows - origin) % horizon == 0
    if prompt_rule != "train":
        head |= in_prompt
    a = np.where(in_prompt & (prompt_rule == "plain"), 0.0, 1.0)
    return a, head.astype(np.float64)


def dmtd_decode(
    model: SplitForward,
    prompt: Sequence[int],
    max_tokens: int,
    split: Sequence[int],
    horizon: int,
    prompt_rule: str = "all_heads",
    eos_ids: Collection[int] = (),
    *,
    ignore_eos: bool = False,
    n_ctx: int | None = None,
    mask_id: int | None = None,
) -> Dmtd:
    """Greedy decoding with `split` = layers of (E, T, D); ends as next-token decoding does.

    The NFE is the number of tokens. The last token's own row is never run.
    """
    length = len(prompt) + tokens_wanted(prompt, max_tokens, n_ctx)
    text = list(prompt)
    trace: list[Decision] = []
    reason = "length"
    while len(text) < length and reason == "length":
        a, b = coefficients(len(text), len(prompt), horizon, prompt_rule)
        stats = row_stats(model.forward_split(text, split, a, b, last=1), mask_id)
        token = int(stats.argmax[0])
        trace.append(Decision([len(text)], [token], float(stats.logit_gap[0])))
        text.append(token)
        if token in eos_ids and not ignore_eos:
            reason = "stop"
    b = coefficients(len(text) - 1, len(prompt), horizon, prompt_rule)[1]
    heads = int(b[len(prompt) :].sum())
    return Dmtd(Decoded(text[len(prompt) :], len(trace), reason, trace), 1 + heads, len(trace))
