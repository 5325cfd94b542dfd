"""How probable each of some choices is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from .errors import SbdLengthError

if TYPE_CHECKING:
    from .engine import Engine

# Behind the tokens that some choices begin with: the log-probability of each that goes on with one
# of them, and of the end (None) where one ends there.
Places: TypeAlias = dict[tuple[int, ...], dict[int | None, float]]


def choice_probabilities(
    engine: Engine, ids: Sequence[int], choices: Sequence[str]
) -> dict[str, float]:
    """Of constrained next-token decoding: at each token those that the choices have in its place
    share what is theirs, so this is the product of their shares."""
    texts = _scored(engine, ids, choices)
    places: Places = {}
    for tokens, logprobs in texts.values():
        for i, token in enumerate(tokens):
            places.setdefault(tokens[:i], {})[token] = logprobs[i]
    for tokens, _ in texts.values():
        if tokens in places:  # others go on
            ends = [
                engine.score([*ids, *tokens, eos]).logprobs[-1] or 0.0  # 0: it is certain
                for eos in engine.tokenizer.eos_token_ids
            ]
            places[tokens][None] = _log_of_sum(ends)
    shares = {place: _shares(following) for place, following in places.items()}
    return {
        choice: math.exp(
            sum(shares[tokens[:i]][token] for i, token in enumerate(tokens))
            + shares.get(tokens, {}).get(None, 0.0)
        )
        for choice, (tokens, _) in texts.items()
    }


def _scored(
    engine: Engine, ids: Sequence[int], choices: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], list[float]]]:
    """Tokens and their log-probabilities. The prompt is computed once."""
    engine.check(ids, choices=choices, max_tokens=1, decoder="ntp")  # or an error has a batch in it
    different = list(dict.fromkeys(choices))
    calls = [
        {"prompt": ids, "choices": [choice], "max_tokens": len(choice.encode()) + 1}
        for choice in different
    ]
    texts = {}
    done = engine.generate_batch(calls, decoder="ntp", logprobs=0)
    for choice, one in zip(different, done, strict=True):
        if one.finish_reason != "stop":
            raise SbdLengthError(
                f"{len(ids)} prompt tokens leave no room for each of the choices in the context of "
                f"{engine.n_ctx}"
            )
        assert one.logprobs is not None
        texts[choice] = tuple(one.tokens), [each.logprob for each in one.logprobs]
    return texts


def _shares(following: Mapping[int | None, float]) -> dict[int | None, float]:
    """In logarithms."""
    total = _log_of_sum([*following.values()])
    return {token: logprob - total for token, logprob in following.items()}


def _log_of_sum(logarithms: Sequence[float]) -> float:
    """Without numpy, which takes every command 0.2 s to import."""
    highest = max(logarithms, default=-math.inf)
    if highest == -math.inf:
        return highest
    return highest + math.log(math.fsum(math.exp(each - highest) for each in logarithms))
