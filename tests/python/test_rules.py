"""What a row is decided under, biases, penalties and min-p, and log-probabilities: against numpy
and transformers' own processors, on the raw logits of `forward`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python.command import PROMPT, check_error, run_here
from python.tiny_model import MASK, VOCAB_SIZE, byte_tokenizer, write_tiny_model
from reference.stats import log_softmax

from sbd_engine import Engine, SbdError, TokenLogprob
from sbd_engine.convert import convert

MASK_ID = byte_tokenizer().token_to_id(MASK)
RULES: dict[str, Any] = {
    "logit_bias": {17: 40.0, 40: 25.0, 99: -100},
    "presence_penalty": 2.0,
    "frequency_penalty": 1.9,
    "repetition_penalty": 1.4,
}


def under_rules(logits: Any, prompt: Sequence[int], text: Sequence[int], **rules: Any) -> Any:
    """The bias, transformers' repetition penalty, OpenAI's two penalties, no mask token."""
    changed = logits.astype(np.float64)
    for token, bias in rules.get("logit_bias", {}).items():
        changed[token] += bias
    factor = rules.get("repetition_penalty", 1.0)
    for token in {*prompt, *text}:
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
    for token, count in Counter(text).items():
        changed[token] -= rules.get("presence_penalty", 0.0)
        changed[token] -= rules.get("frequency_penalty", 0.0) * count
    changed[MASK_ID] = -np.inf
    return changed


def check_logprob(got: TokenLogprob, token: int, logits: Any, n_best: int) -> None:
    """Of the row's own distribution, the mask token in it."""
    expected = log_softmax(logits)
    assert got.token == token
    assert got.logprob == pytest.approx(expected[token], abs=1e-4)
    assert len(got.best) == n_best
    order = np.argsort(-logits, kind="stable")[:n_best]
    assert [each for each, _ in got.best] == order.tolist()
    assert [logprob for _, logprob in got.best] == pytest.approx(expected[order], abs=1e-4)


@pytest.mark.parametrize(
    "rules",
    [{name: value} for name, value in RULES.items()]
    + [RULES, {"presence_penalty": -2, "repetition_penalty": 0.8}],
)
def test_text_from_left_to_right(engine: Engine, rules: dict[str, Any]) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    call = {"max_tokens": 32, "decoder": "ntp", "ignore_eos": True, "logprobs": 4}
    done = engine.generate(ids, **call, **rules)
    assert done.logprobs is not None
    text: list[int] = []
    for token, logprob in zip(done.tokens, done.logprobs, strict=True):
        logits = engine.forward([*ids, *text])[-1]
        assert token == under_rules(logits, ids, text, **rules).argmax()
        check_logprob(logprob, token, logits, 4)
        text.append(token)
    assert done.tokens != engine.generate(ids, **call).tokens


def test_the_repetition_penalty_is_transformers(engine: Engine) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = engine.tokenizer.encode(PROMPT)
    for penalty in (1.3, 0.75):
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        text: list[int] = []
        for _ in range(12):
            logits = torch.from_numpy(engine.forward([*ids, *text])[-1:])
            scores = theirs(torch.tensor([[*ids, *text]]), logits)[0]
            scores[MASK_ID] = -math.inf
            text.append(int(scores.argmax()))
        done = engine.generate(
            ids, max_tokens=12, decoder="ntp", ignore_eos=True, repetition_penalty=penalty
        )
        assert done.tokens == text


@pytest.mark.parametrize("min_p", [0.3, 0.9, 1.0])
def test_min_p_is_transformers(engine: Engine, min_p: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MinPLogitsWarper(min_p)
    ids = engine.tokenizer.encode(PROMPT)
    call = {"max_tokens": 20, "decoder": "ntp", "ignore_eos": True, "temperature": 20.0}
    decided = 0
    for seed in range(3):
        text: list[int] = []
        for chunk in engine.stream(ids, **call, min_p=min_p, seed=seed):
            logits = torch.from_numpy(engine.forward([*ids, *text])[-1:])
            logits[0, MASK_ID] = -math.inf
            shares = theirs(None, logits / 20.0)[0].softmax(-1)
            (reveal,) = chunk.revealed
            assert reveal.probability == pytest.approx(float(shares[reveal.token]), rel=1e-3)
            decided += int((shares > 0).sum()) > 1
            text.append(reveal.token)
    assert (decided > 0) == (min_p < 1)  # several tokens were left to draw from


def test_what_openai_s_extremes_do(engine: Engine) -> None:
    call = {"max_tokens": 9, "ignore_eos": True}
    for decoder in ("ntp", "sbd", "sbd_lossless"):
        forced = engine.generate(PROMPT, decoder=decoder, logit_bias={42: 100}, **call)
        assert forced.tokens == [42] * 9
        free = engine.generate(PROMPT, decoder=decoder, **call)
        banned = dict.fromkeys(free.tokens, -100)
        other = engine.generate(PROMPT, decoder=decoder, logit_bias=banned, **call)
        assert not {*other.tokens} & {*free.tokens}


def test_a_verified_text_is_next_token_decoding_s(engine: Engine) -> None:
    # Drafts agree for as long as the bias outweighs the penalties on its token.
    call = {"max_tokens": 40, "ignore_eos": True, "logprobs": 2, **RULES, "logit_bias": {17: 60}}
    expected = engine.generate(PROMPT, decoder="ntp", **call)
    accepted = []
    for gamma in (0.0, 1.0, math.inf):
        # A size that is asked for is kept: drafts are made whether or not they pay.
        blocks = {"gamma": gamma, "block_size": 16}
        done = engine.generate(PROMPT, decoder="sbd_lossless", **blocks, **call)
        assert done.tokens == expected.tokens
        assert done.logprobs == expected.logprobs  # the same bits
        accepted.append(done.stats.accepted_length or 0)
    assert max(accepted) > 1.5


def test_a_block_decided_in_any_order(engine: Engine) -> None:
    """Penalties count what earlier forwards decided, and the row that decided a token has its
    log-probability."""
    ids, block = engine.tokenizer.encode(PROMPT), [MASK_ID] * 8
    call = {"max_tokens": 8, "block_size": 8, "ignore_eos": True, "unmask": "top_n", "top_n": 2}
    expected: dict[int, Any] = {}  # by position, the row
    text: list[int] = []  # in the order that it was decided
    with engine.stream(ids, decoder="sbd", logprobs=3, **call, **RULES) as stream:
        for chunk in stream:
            logits = engine.forward([*ids, *block], block=8)[len(ids) :]
            decided = []
            for reveal in chunk.revealed:
                row = under_rules(logits[reveal.position], ids, text, **RULES)
                assert reveal.token == row.argmax()
                shares = np.exp(log_softmax(row))
                assert reveal.probability == pytest.approx(shares[reveal.token], rel=1e-3)
                expected[reveal.position] = logits[reveal.position]
                block[reveal.position] = reveal.token
                decided.append(reveal.token)
            text += decided
    done = stream.completion
    assert done.tokens == block
    assert list(expected) != sorted(expected)  # not from left to right
    assert done.logprobs is not None
    for position, logprob in enumerate(done.logprobs):
        check_logprob(logprob, block[position], expected[position], 3)


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """It can run nearly every decoder."""
    folder = tmp_path_factory.mktemp("able")
    write_tiny_model(folder)
    settings = ["dmtd.layers=0,2,1", "decoders=sbd,d2f,nemotron_spec"]
    model = folder / "able.bin"
    convert(folder / "checkpoint", model, type="f32", block_size=4, settings=settings)
    with Engine(model) as engine:
        yield engine


@pytest.mark.parametrize("decoder", ["sbd", "sbd_lossless", "dmtd", "d2f", "nemotron_spec", "ntp"])
def test_as_many_as_tokens(decoder: str, able: Engine) -> None:
    """Streamed, batched and cut by a stop string as well."""
    call: dict[str, Any] = {"max_tokens": 23, "decoder": decoder, "ignore_eos": True}
    call |= {"logprobs": 2, **RULES}
    whole = able.generate(PROMPT, **call)
    stop = able.tokenizer.decode(whole.tokens)[5:7]
    for more in ({}, {"stop": stop}, {"max_tokens": 1}):
        asked = {**call, **more}
        done = able.generate(PROMPT, **asked)
        assert done.logprobs is not None
        assert [each.token for each in done.logprobs] == done.tokens
        for each in done.logprobs:
            assert len(each.best) == 2
            assert each.logprob <= each.best[0][1] <= 0
        chunks = [*able.stream(PROMPT, **asked)]
        assert [each for chunk in chunks for each in chunk.logprobs or ()] == done.logprobs
        assert all(len(chunk.tokens) == len(chunk.logprobs or ()) for chunk in chunks)
        batch = able.generate_batch([PROMPT, "Another", PROMPT], **asked)
        assert batch[0].logprobs == batch[2].logprobs == done.logprobs
    assert able.generate(PROMPT, **call, stop=stop).finish_reason == "stop"
    without = able.generate(PROMPT, **{**call, "logprobs": None})
    assert (without.tokens, without.logprobs) == (whole.tokens, None)


def test_sampled_tokens_have_their_own(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    call = {"max_tokens": 12, "decoder": "ntp", "ignore_eos": True, "temperature": 2.0}
    done = engine.generate(ids, logprobs=0, top_p=0.9, **call)
    assert done.logprobs is not None
    scores = engine.score([*ids, *done.tokens])
    expected = scores.logprobs[len(ids) :]
    assert [each.logprob for each in done.logprobs] == pytest.approx(expected, abs=1e-5)
    assert any(rank for rank in scores.ranks[len(ids) :])  # not all the most probable


def test_a_closed_stream_has_what_was_committed(engine: Engine) -> None:
    with engine.stream(PROMPT, ignore_eos=True, logprobs=1) as stream:
        first = next(stream)
    done = stream.completion
    assert done.finish_reason == "cancelled"
    assert done.logprobs is not None
    assert [each.token for each in done.logprobs] == done.tokens
    assert done.logprobs[: len(first.tokens)] == first.logprobs


def test_resolve_names_the_rules_that_are_asked_for(engine: Engine) -> None:
    assert not {*RULES} & {*engine.resolve()}
    resolved = engine.resolve(**RULES)
    assert {name: resolved[name] for name in RULES} == RULES


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ({"logit_bias": {5: math.nan}}, ValueError, "5 as a finite number, got nan"),
        ({"logit_bias": {5: math.inf}}, ValueError, "5 as a finite number, got inf"),
        ({"logit_bias": {5: 10**39}}, ValueError, "5 as a finite number, got 1e\\+39"),
        ({"logit_bias": {5: "1"}}, TypeError, "`logit_bias` of token 5 as a number, got '1'"),
        ({"logit_bias": {"5": 1}}, TypeError, "integer token id in `logit_bias`, got '5'"),
        ({"logit_bias": {-1: 1}}, ValueError, "token id in `logit_bias` >= 0, got -1"),
        ({"logit_bias": [(5, 1)]}, TypeError, "a mapping of token ids to numbers, got list"),
        (
            {"logit_bias": {VOCAB_SIZE: 1}},
            ValueError,
            f"names token {VOCAB_SIZE}, outside the vocabulary of {VOCAB_SIZE}",
        ),
        ({"presence_penalty": 2.1}, ValueError, "`presence_penalty` from -2 to 2, got 2.1"),
        ({"frequency_penalty": -3}, ValueError, "`frequency_penalty` from -2 to 2, got -3"),
        ({"frequency_penalty": math.nan}, ValueError, "`frequency_penalty` from -2 to 2, got nan"),
        ({"repetition_penalty": 0}, ValueError, "`repetition_penalty` above 0 and finite, got 0"),
        ({"repetition_penalty": math.inf}, ValueError, "`repetition_penalty` above 0"),
        ({"repetition_penalty": 1e-60}, ValueError, "`repetition_penalty` above 0"),
        ({"logprobs": 21}, ValueError, "`logprobs` <= 20, got 21"),
        ({"logprobs": -1}, ValueError, "`logprobs` >= 0, got -1"),
        ({"logprobs": True}, TypeError, "integer `logprobs`, got True"),
        ({"min_p": 1.5, "temperature": 1}, ValueError, "`min_p` from 0 to 1, got 1.5"),
        ({"min_p": math.nan, "temperature": 1}, ValueError, "`min_p` from 0 to 1, got nan"),
    ],
)
def test_bad_input(engine: Engine, arguments: dict[str, Any], kind: type, complaint: str) -> None:
    with pytest.raises(kind, match=complaint) as caught:
        engine.generate(PROMPT, **arguments)
    assert isinstance(caught.value, SbdError)
    assert "\n" not in str(caught.value)


class TestRun:
    """`sbd-engine run`."""

    FLAGS = ("--logit-bias", "17=40", "--logit-bias", "99=-100", "--presence-penalty", 2)
    MORE = ("--frequency-penalty", 1.9, "--repeat-penalty", 1.4)

    def test_json(self, engine: Engine, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        call = ("run", model, "-p", PROMPT, "-n", 12, "--json", *self.FLAGS, *self.MORE)
        values = json.loads(run_here(capsys, *call, "--logprobs", 2).stdout)
        rules = {**RULES, "logit_bias": {17: 40.0, 99: -100.0}}
        done = engine.generate(PROMPT, max_tokens=12, logprobs=2, **rules)
        assert values["tokens"] == done.tokens
        assert done.logprobs is not None
        piece = engine.tokenizer.piece
        assert values["logprobs"] == [
            {
                "token": token,
                "text": piece(token),
                "logprob": logprob,
                "best": [{"token": t, "text": piece(t), "logprob": p} for t, p in best],
            }
            for token, logprob, best in done.logprobs
        ]
        expected = {**rules, "logit_bias": {"17": 40.0, "99": -100.0}}
        assert {name: values["options"][name] for name in expected} == expected
        assert json.loads(run_here(capsys, *call).stdout)["logprobs"] is None

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--logprobs", 2], "--logprobs has no effect without --json"),
            (["--json", "--logprobs", 21], "expected --logprobs <= 20, got 21"),
            (["--logit-bias", "5"], "--logit-bias TOKEN=BIAS, such as 42=-100, got '5'"),
            (["--logit-bias", "a=1"], "--logit-bias TOKEN=BIAS"),
            (["--logit-bias", "5=nan"], "--logit-bias of token 5 as a finite number, got nan"),
            (["--logit-bias", "5=1", "--logit-bias", "5=2"], "--logit-bias names token 5 twice"),
            (["--logit-bias", "999=1"], "--logit-bias names token 999, outside the vocabulary"),
            (["--repetition-penalty", 0], "expected --repetition-penalty above 0"),
            (["--presence-penalty", 3], "expected --presence-penalty from -2 to 2, got 3"),
            (["--min-p", 0.5], "--min-p has no effect at temperature 0"),
            (["--min-p", 2, "--temp", 1], "expected --min-p from 0 to 1, got 2"),
        ],
    )
    def test_bad_input(
        self, flags: list[Any], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        check_error(run_here(capsys, "run", model, "-p", PROMPT, *flags), complaint)
