"""The same questions under several decoder settings: what came out, how right it is, how fast.

Every turn takes a batch of questions through all settings, beginning with another one each time, so
that drifts of the machine meet all of them alike, and an interrupted run has compared the same
questions everywhere.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import Engine
from ..errors import SbdError, SbdValueError
from ..json_values import finite
from ..model_file import model_file
from .intervals import Estimate, bootstrap, paired_difference, ratio, share
from .journal import Journal
from .questions import Question, questions_fingerprint
from .scoring import EXACT, is_right

NTP = "ntp"  # the setting that all are compared with
_SLACK_TOKENS = 16  # beyond an exact answer's: one that does not end there is wrong
_MAX_TOKENS = 256  # where nothing says how long a text may be
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Setting:
    """A way to decode: options of Engine.generate, under a name."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What one setting made of one question. seconds: of its batch, in equal shares.

    right: the text has the answer, by the question's score; None where there is no answer.
    agreed: how many of the tokens NTP would have chosen after what stands before them; None where
    there is an answer.
    """

    question: int
    setting: str
    text: str
    tokens: int
    nfe: int
    seconds: float
    right: bool | None
    agreed: int | None
    guesses: int = 0  # lossless decoders: tokens that were drafted and verified
    accepted: int = 0  # of these, kept
    forwards: dict[str, int] | None = None  # by kind


class Evaluation:
    """Runs the settings over the questions. The first setting is NTP, the reference.

    max_tokens: None is as many as an exact answer has, and a few more. chat: prompts go into the
    model's chat template. common: options of Engine.generate for all settings. Results go into the
    journal as they come, and those that it has already are not run again.
    """

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[Question],
        settings: Sequence[Setting],
        *,
        batch: int,
        max_tokens: int | None = None,
        chat: bool = False,
        common: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.questions, self.settings = engine, questions, settings
        self.batch, self.max_tokens, self.chat = batch, max_tokens, chat
        self.common = dict(common or {})
        self._calls: list[dict[str, Any]] = [
            {
                "prompt": encoded(engine, question.prompt, {} if chat else None),
                "max_tokens": self._token_limit(question),
                **self.common,
            }
            for question in questions
        ]
        self._check()

    def _token_limit(self, question: Question) -> int:
        if self.max_tokens is not None:
            return self.max_tokens
        if question.answer is None or question.score != EXACT:
            return _MAX_TOKENS
        return len(self.engine.tokenizer.encode(question.answer, add_bos=False)) + _SLACK_TOKENS

    def _check(self) -> None:
        """Before anything is written: that every prompt fits, and that the engine takes every
        setting. The short generations warm it up as well."""
        for question, call in zip(self.questions, self._calls, strict=True):
            length = len(call["prompt"])
            if length >= self.engine.n_ctx:
                raise SbdValueError(
                    f"{question.source}: expected a prompt shorter than the context of "
                    f"{self.engine.n_ctx} tokens, got {length}"
                )
        call = self._calls[0]
        short = {**call, "max_tokens": min(call["max_tokens"], _SLACK_TOKENS)}
        for setting in self.settings:
            try:
                self.engine.generate(**{**short, **setting.options})
            except SbdError as error:
                if len(self.settings) <= 2:  # whose options these are is plain
                    raise
                raise type(error)(f"{setting.name}: {error}") from None

    @property
    def size(self) -> int:
        """How many results there will be."""
        return len(self.questions) * len(self.settings)

    def run(self, journal: Journal) -> Iterator[int]:
        """Runs what the journal lacks; yields how many results are there, first at once."""
        done = {(line["setting"], line["question"]) for line in journal.lines}
        yield len(done)
        turns = range(0, len(self.questions), self.batch)
        for turn, first in enumerate(turns):
            numbers = range(first, min(first + self.batch, len(self.questions)))
            for offset in range(len(self.settings)):
                setting = self.settings[(turn + offset) % len(self.settings)]
                missing = [n for n in numbers if (setting.name, n) not in done]
                if not missing:
                    continue
                for result in self._generate(setting, missing):
                    journal.append(asdict(result))
                    done.add((result.setting, result.question))
                yield len(done)

    def fits(self, line: dict[str, Any]) -> bool:
        """Whether a line of a journal is a result of this evaluation."""
        try:
            result = Result(**line)
            question = self.questions[result.question]
            known = result.setting in {setting.name for setting in self.settings}
            counts = min(result.question + 1, result.tokens, result.nfe) > 0 and result.seconds > 0
        except (TypeError, IndexError):
            return False
        judged = result.agreed if question.answer is None else result.right
        return known and counts and isinstance(result.text, str) and judged is not None

    def results(self, journal: Journal) -> dict[str, list[Result]]:
        """By setting, of the questions that every setting has answered, in their order."""
        found: dict[str, dict[int, Result]] = {setting.name: {} for setting in self.settings}
        for line in journal.lines:
            result = Result(**line)
            found[result.setting][result.question] = result
        complete = set.intersection(*({*each} for each in found.values()))
        return {name: [each[n] for n in sorted(complete)] for name, each in found.items()}

    def _generate(self, setting: Setting, numbers: Sequence[int]) -> Iterator[Result]:
        calls = [{**self._calls[number], **setting.options} for number in numbers]
        started = time.perf_counter()
        completions = self.engine.generate_batch(calls)
        seconds = (time.perf_counter() - started) / len(numbers)
        for number, completion in zip(numbers, completions, strict=True):
            question = self.questions[number]
            count = len(completion.tokens)
            right: bool | None = None
            agreed: int | None = None
            if question.answer is not None:
                right = is_right(question.score, completion.text, question.answer)
            elif setting.name == NTP:
                agreed = count
            else:
                agreed = self._agreed(self._calls[number]["prompt"], completion.tokens)
            yield Result(
                number,
                setting.name,
                completion.text,
                count,
                completion.stats.nfe,
                seconds,
                right,
                agreed,
                *(completion.stats.drafts or (0, 0, 0))[1:],
                completion.stats.forwards,
            )

    def _agreed(self, prompt: Sequence[int], tokens: Sequence[int]) -> int:
        ids = [*prompt, *tokens[:-1]]
        logits = self.engine.forward(ids)[len(prompt) - 1 :]  # [tokens, vocab_size]
        mask = self.engine.model_config["mask_token_id"]
        if mask is not None:
            logits[:, mask] = -math.inf
        return int((logits.argmax(axis=1) == np.array(tokens)).sum())


def summary(results: Sequence[Result], reference: Sequence[Result]) -> dict[str, Any]:
    """Figures of one setting, `reference` being NTP's results on the same questions.

    quality: the share of right answers (Wilson's interval); without answers, the share of new
    tokens that NTP would have chosen in their place. loss: NTP's quality minus this (paired).
    identical: the share of texts equal to NTP's. tokens_per_forward: all tokens / all NFE.
    speedup: tokens per second over NTP's. Intervals without a name are bootstrapped.
    """
    n = len(results)
    tokens, seconds = [r.tokens for r in results], [r.seconds for r in results]
    answered = results[0].right is not None
    same = sum(r.text == other.text for r, other in zip(results, reference, strict=True))
    if answered:
        quality = share(sum(bool(r.right) for r in results), n)
        loss = paired_difference(
            [bool(r.right) for r in reference], [bool(r.right) for r in results]
        )
    else:
        quality = ratio([r.agreed or 0 for r in results], tokens)
        loss = Estimate(1 - quality.value, 1 - quality.high, 1 - quality.low)
    speedup = bootstrap(
        [tokens, seconds, [r.tokens for r in reference], [r.seconds for r in reference]],
        lambda ours, ours_s, theirs, theirs_s: (ours / ours_s) / (theirs / theirs_s),
    )
    return {
        "questions": n,
        "quality": quality.as_dict(),
        "loss": loss.as_dict(),
        "identical": share(same, n).as_dict(),
        "tokens_per_forward": ratio(tokens, [r.nfe for r in results]).as_dict(),
        "drafts": _drafts(results),
        "tok_s": sum(tokens) / sum(seconds),
        "speedup": speedup.as_dict(),
    }


def _drafts(results: Sequence[Result]) -> dict[str, Any] | None:
    """What a lossless decoder chose to do; None of any other."""
    kinds = sum((Counter(r.forwards) for r in results), Counter[str]())
    if not kinds:
        return None
    return {
        "guesses": sum(r.guesses for r in results),
        "accepted": sum(r.accepted for r in results),
        "forwards": dict(kinds),
    }


def encoded(engine: Engine, prompt: str, template: Mapping[str, Any] | None) -> list[int]:
    """The prompt's ids; in the model's chat template where there are arguments for one."""
    if template is None:
        return engine.tokenizer.encode(prompt)
    return engine.tokenizer.encode_chat([{"role": "user", "content": prompt}], **template)


def file_fingerprint(path: Path) -> str:
    """Tells model files apart without reading all of a large one: size, beginning and end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON; options that are not given are left out."""
    values: dict[str, Any] = finite({k: v for k, v in options.items() if v is not None})
    return values


def identity(
    model: Path | None, evaluation: Evaluation, kv_dtype: str, draft_lora: Path | None = None
) -> dict[str, Any]:
    """What must be equal for a run to go on from its results."""
    engine = evaluation.engine
    with model_file(model) as path:
        content = file_fingerprint(path)
    return {
        "model": content,
        "questions": questions_fingerprint(evaluation.questions),
        "decoders": {s.name: s.options for s in evaluation.settings},
        "common": evaluation.common,
        "max_tokens": evaluation.max_tokens,
        "chat": evaluation.chat,
        "batch": evaluation.batch,
        "device": engine.device,
        "threads": engine.n_threads,
        "n_ctx": engine.n_ctx,
        "kv_dtype": kv_dtype,
        "draft_lora": None if draft_lora is None else file_fingerprint(draft_lora),
    }
