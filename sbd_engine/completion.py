"""What generation gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled"]


class Drafts(NamedTuple):
    """Blocks that a lossless decoder verified, the guesses in them, and those that were kept."""

    verified: int
    guesses: int
    accepted: int


@dataclass(frozen=True)
class Stats:
    """How one completion was computed. A lossless decoder drafts as far as it pays on this machine,
    now: its tokens are always the same, its statistics need not be, but with a block_size.

    nfe: forwards that decided or verified at least one token (number of function evaluations).
    tokens_per_forward: new tokens / nfe.
    ttft_ms: from the call to the first final token.
    prefill_tok_s: prompt tokens per second, over the forwards that ran prompt rows; those that were
    cached do not count.
    decode_tok_s: tokens decided per second after those forwards; with them where none followed.
    accepted_length: lossless decoders: tokens kept of a verified block, in the mean; else None.
    Without a draft a block is one token.
    drafts: lossless decoders: what was verified and accepted; else None.
    forwards: lossless decoders: how many of each kind, "next_token", "draft" (begins or refines
    one), "verify" and "verify_and_draft"; else None.
    thinking_forwards: dmtd: forwards that ran the thinking layers, prefill included; else None.
    cached_tokens: prompt tokens that were not computed, as another text that began alike had left
    their keys and values (Engine's prefix_cache).
    """

    prompt_tokens: int
    nfe: int
    tokens_per_forward: float
    ttft_ms: float
    prefill_tok_s: float
    decode_tok_s: float
    accepted_length: float | None = None
    drafts: Drafts | None = None
    forwards: dict[str, int] | None = None
    thinking_forwards: int | None = None
    cached_tokens: int = 0


class TokenLogprob(NamedTuple):
    """How probable a token was, in the model's own distribution: over the whole vocabulary, without
    temperature, bias, penalties or filters.

    logprob: the natural logarithm of its probability. best: the most probable tokens there and
    theirs, the best first, of equal ones the lower id.
    """

    token: int
    logprob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Scores:
    """How probable each token of a text is behind those before it; nothing stands before the first,
    whose logprob and rank are None.

    logprobs: natural logarithms of probabilities. ranks: how many tokens were more probable, 0 for
    the most probable one; of equal ones the lower id comes first. top: the most probable tokens in
    each one's place and their logprobs, as many as were asked for, the best first.
    """

    tokens: list[int]
    logprobs: list[float | None]
    ranks: list[int | None]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Usage:
    """Of an engine, as of its last forward.

    forwards, rows, prompt_rows: of all its forwards, and how many of their rows were of prompts.
    prompt_tokens, cached_tokens: of all prompts that were begun, and how many of these were found
    in what another text had left. kv_used, kv_cached: bytes of the kv_budget that texts need, and
    that ended ones left. admitted, waiting: texts that run, and that wait for room in the budget.
    """

    forwards: int
    rows: int
    prompt_rows: int
    prompt_tokens: int
    cached_tokens: int
    kv_used: int
    kv_cached: int
    admitted: int
    waiting: int


@dataclass(frozen=True)
class Completion:
    """text: what was generated, without a closing end-of-sequence token or stop string.
    tokens: the new token ids, a closing end-of-sequence token included; with a stop string, up to
    and including the token that completes it.
    finish_reason: "stop" (end of sequence, stop string, or the end that a constraint leaves alone),
    "length" (max_tokens or the context is full), or "cancelled" (a stream closed before its end).
    logprobs: of each token, where `logprobs` asked for them; else None.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    logprobs: list[TokenLogprob] | None = None

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.stats.drafts is not None:
            values["stats"]["drafts"] = self.stats.drafts._asdict()
        return values


class Reveal(NamedTuple):
    """A token that a forward decided.

    position: in the new text. entropy: of the model's distribution there, in nats. probability: of
    the token, in the distribution it was taken from: the model's own at temperature 0.
    """

    position: int
    token: int
    entropy: float
    probability: float


@dataclass(frozen=True)
class Chunk:
    """What one forward added to a stream.

    text: final text, "" where nothing became final. Joined, the chunks are the completion's text.
    tokens: the token ids that became final.
    revealed: every token this forward decided; those behind the final prefix belong to a block that
    is still filling in.
    finish_reason: None in every chunk but the last.
    logprobs: of `tokens`, where `logprobs` asked for them; else None.
    """

    text: str
    tokens: list[int]
    revealed: list[Reveal]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
