"""What a decoder decided against what its reference decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from reference.decoders import Decoded
from reference.model import ReferenceModel, causal
from reference.stats import row_stats

from sbd_engine.completion import Completion

Result = TypeVar("Result")


def untied(decode: Callable[[int], Result], draws: int = 40) -> tuple[int, Result]:
    """The first draw whose every decision float32 can tell, and what the reference gave for it:
    what it decoded, or a tuple that begins with it."""
    for draw in range(draws):
        result = decode(draw)
        decoded = result if isinstance(result, Decoded) else result[0]  # type: ignore[index]
        if decoded.margin > 1e-4:
            return draw, result
    raise AssertionError(f"{draws} draws in a row with a near tie: the model is degenerate")


def check(actual: Completion, expected: Decoded, what: object) -> None:
    assert actual.tokens == expected.tokens, what
    assert actual.finish_reason == expected.finish_reason, what
    assert actual.stats.nfe == expected.nfe, what


def check_next_tokens(
    model: ReferenceModel,
    prompt: list[int],
    actual: Completion,
    *,
    max_tokens: int,
    eos_ids: list[int],
    mask_id: int | None,
    ignore_eos: bool,
) -> None:
    """Greedy next-token decoding's text: each token is the model's choice behind those before it,
    as one forward over all of them says, and the text ends where that one ends."""
    tokens = actual.tokens
    ids = [*prompt, *tokens[:-1]]
    logits = model.forward(ids, causal(len(ids)), last=len(tokens))
    assert tokens == row_stats(logits, mask_id).argmax.tolist()
    ends = [token in eos_ids and not ignore_eos for token in tokens]
    assert not any(ends[:-1])
    assert len(tokens) == max_tokens or (len(tokens) < max_tokens and ends[-1])
