"""One generation on its way: what the engine decided becomes chunks, then a completion."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from .completion import Chunk, Completion, Drafts, FinishReason, Reveal, Stats, TokenLogprob
from .detokenizer import Detokenizer
from .stop_strings import StopStrings

if TYPE_CHECKING:
    from . import _core
    from .tokenizer import Tokenizer


class Session:
    """Absorbs one sequence's events in order. Without a tokenizer all text is "".

    `called` is when the call began, by `clock` (seconds): its time to first token counts from
    there, its prefill from now. scored: log-probabilities come with the tokens.
    skip_special_tokens: they are no part of the text, but for stop strings.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        stop: Sequence[str],
        tokenizer: Tokenizer | None,
        called: float,
        clock: Callable[[], float] = time.perf_counter,
        scored: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = [] if scored else None
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self._special_tokens = tokenizer.special_tokens.contents if tokenizer else {}
        self._skip_special_tokens = skip_special_tokens
        self._stops = _stop_strings(stop, tokenizer)
        self._prompt_tokens = len(prompt)
        self._clock = clock
        self._called = called
        self._started = self._prefilled = self._now = clock()
        self._first_token: float | None = None
        self._nfe = 0
        self._accepted: list[int] = []
        self._drafts = Drafts(0, 0, 0)
        self._forwards: Counter[str] = Counter()
        self._thinking_forwards = 0
        self._decided_in_prefill = 0
        self._cached_tokens = 0

    def absorb(self, event: _core.Event) -> Chunk:
        """What the event adds. After the chunk with a finish_reason no event may follow. Raises
        the event's error, where it is one."""
        committed, reveals, finished, scores, prompt, draft, ran_thinking, age = event.read()
        if finished == "cancelled":  # text that was held back is let out
            self.finish_reason = "cancelled"
            text = self._flush()
            self._text.append(text)
            return Chunk(text, [], [], self.finish_reason, self._scored([], []))
        self._now = self._clock() - age
        revealed = list(map(Reveal._make, reveals))
        prompt_rows, cached_tokens = prompt
        accepted, guesses, kind = draft
        self._nfe += bool(revealed) or accepted is not None
        if accepted is not None:
            self._accepted.append(accepted)
            if guesses:
                verified, guessed, kept = self._drafts
                self._drafts = Drafts(verified + 1, guessed + guesses, kept + accepted - 1)
        if kind is not None:
            self._forwards[kind] += 1
        self._thinking_forwards += ran_thinking
        self._cached_tokens += cached_tokens
        if prompt_rows:
            self._prefilled = self._now
            self._decided_in_prefill += len(revealed)
        if committed and self._first_token is None:
            self._first_token = self._now

        # The last token is an end of sequence, which has no text; where a grammar ends it has.
        closes = finished == "stop"
        n_read, text = self._read(committed[:-1] if closes else committed)
        tokens = committed[:n_read] if self._stops.stopped else committed
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif finished:
            text += self._flush()
            stopped = closes or finished == "complete" or self._stops.stopped
            self.finish_reason = "stop" if stopped else "length"
        self._text.append(text)
        self._tokens += tokens
        logprobs = self._scored(scores, tokens)
        return Chunk(text, tokens, revealed, self.finish_reason, logprobs)

    def completion(self) -> Completion:
        """The result so far; final once there is a finish_reason."""
        return Completion(
            "".join(self._text),
            list(self._tokens),
            self.finish_reason or "cancelled",
            self._stats(),
            None if self._logprobs is None else list(self._logprobs),
        )

    def _scored(
        self,
        scores: Sequence[_core.Scored],
        tokens: Sequence[int],
    ) -> list[TokenLogprob] | None:
        """Of the tokens that came first, where they are wanted."""
        if self._logprobs is None:
            return None
        came = zip(scores, tokens, strict=False)  # a stop string leaves tokens out
        logprobs = [TokenLogprob(token, logprob, best) for (token, logprob, _, best), _ in came]
        self._logprobs += logprobs
        return logprobs

    def _read(self, tokens: Sequence[int]) -> tuple[int, str]:
        """The tokens' text as far as a stop string, and how many tokens that is."""
        if self._detokenizer is None or not tokens:
            return len(tokens), ""
        if not self._stops.any and self._special_tokens.keys().isdisjoint(tokens):
            return len(tokens), self._detokenizer.feed(*tokens)
        pieces: list[str] = []
        for token in tokens:
            pieces.append(self._text_of(token, self._detokenizer))
            if self._stops.stopped:
                break
        return len(pieces), "".join(pieces)

    def _text_of(self, token: int, detokenizer: Detokenizer) -> str:
        special = self._special_tokens.get(token)
        if special is not None:
            if self._skip_special_tokens:
                return self._stops.feed_whole(special, shown="")
            text = self._stops.feed(detokenizer.flush())  # of a character that never came to be
            return text if self._stops.stopped else text + self._stops.feed_whole(special, special)
        return self._stops.feed(detokenizer.feed(token))

    def _flush(self) -> str:
        if self._detokenizer is None or self._stops.stopped:
            return ""
        text = self._stops.feed(self._detokenizer.flush())
        return text if self._stops.stopped else text + self._stops.flush()

    def _stats(self) -> Stats:
        first = self._now if self._first_token is None else self._first_token
        decoded, since = max(0, len(self._tokens) - self._decided_in_prefill), self._prefilled
        if decoded == 0:  # one block was all: its forward is the only time there is
            decoded, since = len(self._tokens), self._started
        return Stats(
            prompt_tokens=self._prompt_tokens,
            nfe=self._nfe,
            tokens_per_forward=_ratio(len(self._tokens), self._nfe),
            ttft_ms=1e3 * (first - self._called),
            prefill_tok_s=_ratio(
                self._prompt_tokens - self._cached_tokens, self._prefilled - self._started
            ),
            decode_tok_s=_ratio(decoded, self._now - since),
            accepted_length=fmean(self._accepted) if self._accepted else None,
            drafts=self._drafts if self._forwards else None,
            forwards=dict(self._forwards) or None,
            thinking_forwards=self._thinking_forwards or None,
            cached_tokens=self._cached_tokens,
        )


def _stop_strings(stop: Sequence[str], tokenizer: Tokenizer | None) -> StopStrings:
    """Each as a text, and with the special tokens that it spells as such."""
    if tokenizer is None or not stop:
        return StopStrings(stop)
    as_tokens = map(tokenizer.special_tokens.symbols, stop)
    return StopStrings([*stop, *as_tokens], spaced=tokenizer.spaces_words)


def _ratio(count: int, per: float) -> float:
    return count / per if per > 0 else 0.0
