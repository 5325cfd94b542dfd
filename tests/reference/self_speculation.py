"""Linear self-speculation of Nemotron-Labs-Diffusion, uncached: draft a block, verify it causally.

As linear_spec_generate in nvidia/Nemotron-Labs-Diffusion-8B's modeling file has it:

    prompt, causal: its last row gives the first token
    repeat
      draft:   [newest token, masks, block]: the argmax of every mask, keys and values dropped
      verify:  [newest token, draft, causal]: keep the leading draft tokens that agree with the
               argmax of the row before, and the argmax of the last row that still counts;
               keys and values behind it are dropped

so each round adds as many tokens as agree, and one. Its draft alone may run with an adapter
(`drafting.py`), over keys and values of the plain weights. Both forwards of a round count in the
NFE, and the prompt's counts one, as there. It can run past the tokens wanted; ours is cut. The text
is that of greedy next-token prediction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .decoders import Decision, Decoded, Forward, tokens_wanted
from .model import causal, with_block
from .stats import row_stats


def self_speculation_decode(
    model: Forward,
    prompt: Sequence[int],
    max_tokens: int,
    block_size: int,
    mask_id: int,
    eos_ids: Collection[int] = (),
    *,
    ignore_eos: bool = False,
    n_ctx: int | None = None,
) -> tuple[Decoded, list[int]]:
    """The text, and for each round how many of the block's tokens it kept, the first included."""
    length = len(prompt) + tokens_wanted(prompt, max_tokens, n_ctx)
    ends_text = set() if ignore_eos else set(eos_ids)
    text = list(prompt)
    trace: list[Decision] = []
    accepted: list[int] = []

    def add(tokens: list[int], margin: float) -> None:
        """Up to the first EOS or the last token wanted."""
        eos = next((i for i, token in enumerate(tokens) if token in ends_text), len(tokens))
        tokens = tokens[: eos + 1][: length - len(text)]
        trace.append(Decision(list(range(len(text), len(text) + len(tokens))), tokens, margin))
        text.extend(tokens)

    if len(text) < length:
        stats = row_stats(model.forward(text, causal(len(text)), last=1), mask_id)
        add([int(stats.argmax[0])], float(stats.logit_gap[0]))
    while len(text) < length and text[-1] not in ends_text:
        start = len(text) - 1  # the newest token's own row has not been kept
        rows = block_size if n_ctx is None else min(block_size, n_ctx - start)
        draft: list[int] = []
        if rows > 1:
            ids = [*text, *[mask_id] * (rows - 1)]
            logits = model.forward(ids, with_block(start + rows, rows), last=rows)
            stats = row_stats(logits[1:], mask_id)
            draft = [int(token) for token in stats.argmax]
            positions = list(range(start + 1, start + rows))
            trace.append(Decision(positions, draft, float(stats.logit_gap.min())))
        ids = text + draft
        stats = row_stats(model.forward(ids, causal(len(ids)), last=rows), mask_id)
        agree = next((j for j in range(rows - 1) if draft[j] != stats.argmax[j]), rows - 1)
        tokens = [int(token) for token in stats.argmax[: agree + 1]]
        add(tokens, float(stats.logit_gap[: agree + 1].min()))
        accepted.append(1 + min(agree, len(trace[-1].tokens)))
    reason = "stop" if text[-1] in ends_text else "length"
    return Decoded(text[len(prompt) :], len(trace), reason, trace), accepted
