"""Calls that mypy must take, and some that it must not. Never run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sbd_engine import Completion, Engine, Reveal, SbdFileError, SbdValueError, Scores, TokenLogprob


def prompts(engine: Engine, ids: npt.NDArray[np.int64], small: npt.NDArray[np.uint16]) -> str:
    engine.generate("text", max_tokens=None, decoder=None, temperature=None, stop=None)
    engine.generate([1, 2, 3])
    engine.generate(ids)
    engine.stream(small, seed=7)
    done: list[Completion] = engine.generate_batch(
        ["text", ids, {"prompt": small, "gamma": 0.1}], max_tokens=8
    )
    engine.generate(np.zeros(3))  # type: ignore[arg-type]
    engine.generate("text", max_token=8)  # type: ignore[call-arg]
    engine.generate_batch(["text"], gamma="much")  # type: ignore[arg-type]
    return engine.tokenizer.decode(ids) + done[0].text + str(engine.forward(ids).shape)


def rules(engine: Engine, ids: npt.NDArray[np.int64]) -> list[TokenLogprob] | None:
    Engine("model.bin", kv_budget=2**30, prefix_cache=0)
    Engine(kv_budget="1GiB")  # type: ignore[arg-type]
    for chunk in engine.stream(ids, logprobs=2, logit_bias={5: -100, 7: 1.5}, min_p=None):
        print([each.logprob for each in chunk.logprobs or []])
    engine.generate("text", repetition_penalty=1.1, presence_penalty=0, frequency_penalty=None)
    engine.generate("text", logit_bias=[(5, 1.0)])  # type: ignore[arg-type]
    return engine.generate("text", logprobs=0).logprobs


def scores(engine: Engine) -> list[float]:
    scored: Scores = engine.score("text", top=3)
    engine.score([1, 2, 3])
    return [logprob for logprob in scored.logprobs if logprob is not None]


def reveals(engine: Engine) -> list[Reveal]:
    try:
        return [reveal for chunk in engine.stream("text") for reveal in chunk.revealed]
    except (SbdValueError, SbdFileError):
        return []
