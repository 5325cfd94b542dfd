"""Texts that must be something: valid whoever decides them, and next-token decoding's own where
they are verified."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from python.command import PROMPT, check_error, run_here
from python.tiny_model import EOS, MASK, with_template, write_tiny_model
from reference.dmtd import PROMPT_RULES, coefficients
from reference.model import ReferenceModel
from reference.sampling import Sampling, sure_tokens
from safetensors.numpy import load_file
from tokenizers import AddedToken

from sbd_engine import Engine, SbdError, SbdGrammarError, SbdTypeError, SbdValueError

from .constrained import (
    EOS_ID,
    MASK_ID,
    Spelt,
    check_begins,
    check_valid,
    constrained_ntp,
)
from .schemas import CHOICES, GRAMMARS, REGEXES, constraints, schema
from .test_methods_against_reference import FAMILIES

N_SCHEMAS = int(os.environ.get("SBD_SCHEMAS", "44"))
N_MODELS = int(os.environ.get("SBD_MODELS", "2"))
DECODERS: tuple[dict[str, Any], ...] = (
    {"decoder": "ntp"},
    {"decoder": "sbd_lossless", "block_size": 8, "gamma": 1},
    {"decoder": "sbd_lossless"},
    {"decoder": "nemotron_spec", "block_size": 5},
    {"decoder": "sbd", "block_size": 1},
    {"decoder": "sbd", "block_size": 8, "gamma": 0.5},
    {"decoder": "sbd", "block_size": 32, "unmask": "top_n", "top_n": 3},
)


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


def test_every_text_that_ends_is_valid(demo: Engine, model: Path) -> None:
    """Of both models, all decoders, temperature 0 and 1; those that are cut begin a valid one."""
    with Engine(model) as tiny:
        ended = dict.fromkeys(range(len(DECODERS)), 0)
        for i, constraint in enumerate(constraints(N_SCHEMAS)):
            for engine in (tiny, demo):
                decoder = (i * 3 + (engine is demo)) % len(DECODERS)
                call = {**DECODERS[decoder], **constraint, "max_tokens": 160}
                call |= {"temperature": i // 2 % 2, "seed": i}
                done = engine.generate(PROMPT, **call)
                if done.finish_reason == "stop":
                    ended[decoder] += 1
                    check_valid(done.text, constraint)
                else:
                    assert done.finish_reason == "length" and len(done.tokens) == 160
                    check_begins(engine, done, call)
        assert min(ended.values()) > 5, ended


@pytest.mark.parametrize("family", ["nemotron", "sdar", "fast_dllm_v2"])
def test_texts_of_the_cached_families_are_valid(family: str, tmp_path: Path) -> None:
    settings = [f"{key}={value}" for key, value in FAMILIES[family][1].items()]
    ended = 0
    with Engine(write_tiny_model(tmp_path, settings=[f"decoders={family}", *settings])) as engine:
        for i, constraint in enumerate(constraints(N_SCHEMAS // 2)):
            call = {**constraint, "max_tokens": 100, "temperature": i % 2, "seed": i}
            call |= {"block_size": 8 * (1 + i % 4), "confidence_threshold": i % 3 * 0.4}
            done = engine.generate(PROMPT + "x" * (i % 9), **call)
            if done.finish_reason == "stop":
                ended += 1
                check_valid(done.text, constraint)
            else:
                check_begins(engine, done, call)
    assert ended > 20


def test_texts_are_an_uncached_reference_s(tmp_path: Path) -> None:
    """Next-token decoding's, and a verified draft's, on random models."""
    compared = 0
    for seed in range(N_MODELS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with Engine(write_tiny_model(folder, seed=seed + 50)) as engine:
            ids = engine.tokenizer.encode(PROMPT)
            chosen = Random(seed).sample(constraints(30), 20)
            for i, constraint in enumerate(chosen):
                temperature = i % 2 * 0.9
                sampling = Sampling(temperature, seed=i)
                expected = constrained_ntp(engine, ids, constraint, 40, sampling)
                tokens, margins, reason = expected
                sure = sure_tokens(margins, 1e-3)
                for decoder in DECODERS[:4]:
                    done = engine.generate(
                        ids, max_tokens=40, temperature=temperature, seed=i, **decoder, **constraint
                    )
                    assert done.tokens[:sure] == tokens[:sure], (seed, constraint, decoder)
                    if sure == len(tokens):
                        assert done.tokens == tokens and done.finish_reason == reason
                        compared += 1
    assert compared > 60 * N_MODELS


@pytest.mark.parametrize("rule", PROMPT_RULES)
def test_dmtd_s_texts_are_an_uncached_reference_s(rule: str, tmp_path: Path) -> None:
    """Whatever is forced, of which no token has a forward of its own."""
    split = (1, 2, 1)
    keys = ("decoders=dmtd", "dmtd.layers=1,2,1", f"dmtd.prompt_rule={rule}")
    path = write_tiny_model(tmp_path, layers=sum(split), settings=keys)
    checkpoint = tmp_path / "checkpoint"
    config = json.loads((checkpoint / "config.json").read_text())
    reference = ReferenceModel(config, load_file(checkpoint / "model.safetensors"))
    tokens = forwards = 0
    with Engine(path, kv_dtype="f32") as engine:
        ids = engine.tokenizer.encode(PROMPT)
        for i, constraint in enumerate(constraints(12)):
            horizon = 1 + i % 5

            def last_logits(text: list[int], horizon: int = horizon) -> Any:
                factors = coefficients(len(text), len(ids), horizon, rule)
                return reference.forward_split(text, split, *factors, last=1)[-1]

            sampling = Sampling(i % 2 * 0.9, seed=i)
            expected, margins, reason = constrained_ntp(
                engine, ids, constraint, 30, sampling, last_logits
            )
            done = engine.generate(
                ids,
                max_tokens=30,
                temperature=sampling.temperature,
                seed=i,
                horizon=horizon,
                **constraint,
            )
            sure = sure_tokens(margins, 1e-3)
            assert done.tokens[:sure] == expected[:sure], (constraint, horizon)
            if sure == len(expected):
                assert (done.tokens, done.finish_reason) == (expected, reason)
                tokens, forwards = tokens + len(expected), forwards + done.stats.nfe
    assert tokens > 200 and forwards < 0.9 * tokens


def test_verified_texts_are_ntps(demo: Engine) -> None:
    """To the token, streamed and in a batch beside others, whatever is drafted."""
    calls = [
        {"prompt": f"JSON: item {i}\n", "max_tokens": 60, "temperature": i % 3 * 0.5, "seed": i}
        | constraint
        for i, constraint in enumerate(constraints(24))
    ]
    expected = demo.generate_batch([{**call, "decoder": "ntp"} for call in calls])
    free = {"prompt": PROMPT, "max_tokens": 30}
    alone = demo.generate(**free, decoder="sbd")
    ways = DECODERS[1:4]
    batch = [{**call, **ways[i % 3]} for i, call in enumerate(calls)]
    *done, beside = demo.generate_batch([*batch, {**free, "decoder": "sbd"}])
    drafted = 0
    for call, one, ntp in zip(calls, done, expected, strict=True):
        assert one.tokens == ntp.tokens, call
        assert (one.text, one.finish_reason) == (ntp.text, ntp.finish_reason)
        drafted += one.stats.drafts.accepted if one.stats.drafts else 0
    assert drafted > 20
    assert beside.tokens == alone.tokens
    with demo.stream(**batch[0]) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == expected[0].text

    async def read() -> list[int]:
        async with demo.astream(**batch[1]) as stream:
            return [token async for chunk in stream for token in chunk.tokens]

    assert asyncio.run(read()) == expected[1].tokens


def test_log_probabilities_come_with_every_token(demo: Engine) -> None:
    call = {"json_schema": schema(1), "max_tokens": 60}
    free = demo.generate(PROMPT, decoder="ntp", **call)
    for decoder in ("ntp", "sbd_lossless", "sbd"):
        done = demo.generate(PROMPT, decoder=decoder, logprobs=2, **call)
        assert done.logprobs is not None
        assert [each.token for each in done.logprobs] == done.tokens
        assert decoder == "sbd" or done.tokens == free.tokens


def test_what_is_forced_takes_no_forward(demo: Engine) -> None:
    names = [f"property_number_{i}" for i in range(4)]
    wanted = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    for decoder in ("ntp", "sbd_lossless", "sbd"):
        done = demo.generate(PROMPT, json_schema=wanted, decoder=decoder)
        assert [*json.loads(done.text)] == names
        assert done.finish_reason == "stop"
        assert demo.tokenizer.eos_token_ids[0] not in done.tokens  # only an end was possible
        assert done.stats.nfe < len(done.tokens) / 3, decoder
        # As the tokenizer itself has it, but for the end, which it may join to what follows.
        start = demo.tokenizer.encode(f'{{"{names[0]}":', add_bos=False)
        assert done.tokens[: len(start) - 1] == start[:-1]
    assert demo.generate(PROMPT, choices=["only this"]).text == "only this"


def test_how_probable_each_choice_is(tmp_path: Path) -> None:
    """As logits say it in float64, and as often as it is said."""
    with Engine(write_tiny_model(tmp_path), kv_dtype="f32") as engine:
        ids = engine.tokenizer.encode(PROMPT)
        for choices in ([*CHOICES[0], "yes"], CHOICES[1], CHOICES[3], CHOICES[5], CHOICES[6]):
            found = engine.choice_probabilities(PROMPT, choices)
            assert [*found] == [*dict.fromkeys(choices)]
            for choice in choices:
                text = engine.tokenizer.encode(choice, add_bos=False)
                probability = 1.0
                for i in range(len(text) + 1):
                    matcher = Spelt(engine, choices)
                    matcher.consume_tokens(text[:i])
                    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                    allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
                    logits = engine.forward([*ids, *text[:i]])[-1].astype(np.float64)
                    shares = np.exp(logits[allowed] - logits[allowed].max())
                    said = text[i] if i < len(text) else EOS_ID
                    probability *= float(shares[allowed == said].item() / shares.sum())
                assert found[choice] == pytest.approx(probability, rel=1e-4), choice
            assert sum(found.values()) == pytest.approx(1)
        calls = [{"prompt": PROMPT, "seed": seed} for seed in range(600)]
        found = engine.choice_probabilities(PROMPT, CHOICES[1])
        done = engine.generate_batch(calls, choices=CHOICES[1], temperature=1, decoder="ntp")
        for choice, probability in found.items():
            often = sum(one.text == choice for one in done)
            deviation = (600 * probability * (1 - probability)) ** 0.5
            assert abs(often - 600 * probability) < 4 * deviation + 1, (choice, often)
        with pytest.raises(SbdValueError, match="leave no room"):
            engine.choice_probabilities((ids * 100)[:508], CHOICES[3])
        with pytest.raises(SbdValueError, match="^expected a prompt shorter"):
            engine.choice_probabilities([5] * 513, ["a"])
        with pytest.raises(SbdValueError, match="got none"):
            engine.choice_probabilities(PROMPT, None)  # type: ignore[arg-type]


def test_an_end_that_is_chosen_is_among_the_tokens(demo: Engine) -> None:
    done = demo.generate(PROMPT, regex="a+", logit_bias={demo.tokenizer.eos_token_ids[0]: 100})
    assert done.text.strip("a") == "" and done.text
    assert done.tokens[-1] == demo.tokenizer.eos_token_ids[0]
    assert done.finish_reason == "stop"


def test_special_tokens_are_only_text(engine: Engine) -> None:
    for text in (EOS, MASK, f"x{EOS}y"):
        for decoder in ("ntp", "sbd_lossless", "sbd"):
            done = engine.generate(PROMPT, choices=[text, text + "!"], decoder=decoder)
            assert done.text in (text, text + "!")
            assert EOS_ID not in done.tokens[:-1] and MASK_ID not in done.tokens


def test_tokens_in_angle_brackets_are_spelled_in_a_text(tmp_path: Path) -> None:
    """They are special to llguidance, whatever the tokenizer says of them."""
    with Engine(with_template(tmp_path, "", [AddedToken("<word>", normalized=False)])) as engine:
        own = engine.tokenizer.encode("<word>", add_bos=False)
        assert len(own) == 1
        for decoder in ("ntp", "sbd_lossless", "sbd"):
            done = engine.generate(PROMPT, choices=["a<word>b", "a<word>c"], decoder=decoder)
            assert done.text in ("a<word>b", "a<word>c") and own[0] not in done.tokens
            done = engine.generate(PROMPT, regex=r"[^a]{5}", decoder=decoder,
                                   logit_bias={own[0]: 100})  # fmt: skip
            assert own[0] not in done.tokens and len(done.text) == 5


def test_a_constraint_that_cannot_be(engine: Engine) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"regex": "("}, "`regex`: "),
        ({"regex": "(?=a)b"}, "`regex`: "),
        ({"regex": ""}, "at least one character"),
        ({"regex": "a\\\\\\"}, "nothing behind it"),
        ({"regex": "((a{1000}){1000}){1000}"}, "more than 16384 bytes"),
        ({"regex": "[ab]((a{1000}){1000}){1000}"}, "too many states"),
        ({"regex": 5}, "as a string"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "nothing at all"}, "`grammar`: "),
        ({"grammar": f'start: "<[" <[{EOS_ID}]> // <[1]>'}, "an end of sequence"),
        ({"grammar": f"start: <[2,{MASK_ID - 1}-{MASK_ID + 1}]>"}, "or the mask token"),
        ({"grammar": "start: <[^5]>"}, "expected ids of tokens as"),
        ({"grammar": "start: <[5-\u00b2]>"}, "expected ids of tokens as"),
        ({"grammar": f"start: <[{'9' * 5000}]>"}, "expected ids of tokens as"),
        ({"grammar": '{"grammars": []}'}, "`grammar`: 1(1)"),
        ({"json_schema": "{"}, "as JSON"),
        ({"json_schema": [1]}, "as a JSON Schema, an object"),
        ({"json_schema": {"a": {1, 2}}}, "of what JSON can hold"),
        ({"json_schema": {"type": "nothing"}}, "`json_schema`: "),
        ({"json_schema": {"not": {"type": "object"}}}, "not"),
        ({"json_schema": {"type": "string", "format": "telephone"}}, "telephone"),
        ({"json_schema": {"$ref": "https://example.com/x"}}, "`json_schema`: "),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": False}, "as a JSON Schema"),
        ({"json_schema": {"x-guidance": {"whitespace_pattern": "x*"}}}, "x-guidance"),
        ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "recursion limit"),
        ({"json_schema": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}},
         "more than 16384 bytes"),
        ({"json_schema": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}, "never ends"),
        ({"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
         "never ends: "),
        ({"json_schema": {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"},
                                          "minItems": 1}},
                          "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}}},
         "never ends once it comes to '#/$defs/n'"),
        ({"json_schema": {"const": -(2**63) + 1}}, "up to 2^53"),
        ({"json_schema": {"enum": ["a", {"b": [2**53 + 1]}]}}, "got 9007199254740993"),
        ({"json_schema": {"const": 0.12345678901234567}}, "at most 15 digits"),
        ({"grammar": 'start: %json {"const": -9223372036854775807}'}, "above -9223372036854775000"),
        ({"grammar": 'start: "a" start'}, "never ends: "),
        ({"grammar": 'start: /[a:]/ | b?\nb: ("x" | [A] c)\nA: "y"\nc: "("i c{1,3} ")" // c: A'},
         "never ends once it comes to 'c'"),
        ({"regex": "a{16000}a{4000}"}, "if it ends at all"),
        ({"grammar": 'start: ""'}, "the empty text alone"),
        ({"grammar": "start: a\na: start"}, "never ends: "),
        ({"grammar": 'start: X\nX: "a" & "b"'}, "no text at all"),
        ({"choices": []}, "got none"),
        ({"choices": "yes"}, "as a list of strings"),
        ({"choices": ["a", 5]}, "got 5 in it"),
        ({"choices": ["a", ""]}, "at least one character"),
        ({"choices": ["a"] * 5000}, "1 to 4096"),
        ({"regex": "a", "choices": ["a"]}, "got `regex` and `choices`"),
        ({"regex": "a", "ignore_eos": True}, "`ignore_eos` has no effect with `regex`"),
        ({"regex": "a" * (1 << 20)}, "at most"),
    ]  # fmt: skip
    for arguments, message in refused:
        with pytest.raises((SbdValueError, SbdTypeError)) as error:
            engine.generate(PROMPT, **arguments)
        assert message in str(error.value), (arguments, str(error.value))
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_text_that_meets_the_limits_leaves_the_next_one_its_own(engine: Engine) -> None:
    """Though they share what is compiled."""
    spends = "(a(x{1000}){1000}|b)"
    bias = {engine.tokenizer.encode("a")[-1]: 100}
    spending = {"prompt": PROMPT, "regex": spends, "logit_bias": bias}
    with pytest.raises(SbdGrammarError, match="^prompt 1 of the batch: .*too many states"):
        engine.generate_batch([PROMPT, spending])
    bias = {engine.tokenizer.encode("b")[-1]: 100}
    assert engine.generate(PROMPT, regex=spends, logit_bias=bias).text == "b"


def test_decoders_that_cannot_are_refused_by_name(demo: Engine) -> None:
    with pytest.raises(SbdError, match='decoder "d2f" cannot keep a text to a grammar'):
        demo.generate(PROMPT, regex="a+", decoder="d2f")


def test_a_batch_s_constraint_is_its_own_prompt_s(demo: Engine) -> None:
    prompts = [PROMPT, {"prompt": PROMPT, "regex": "b{2}"}, {"prompt": PROMPT, "regex": None}]
    texts = [done.text for done in demo.generate_batch(prompts, choices=["aa"], max_tokens=4)]
    assert texts[:2] == ["aa", "bb"]


def test_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps({"enum": [12, 345]}))
    (tmp_path / "grammar.lark").write_text('start: "x" "y"')
    for flags, texts in (
        (("--json-schema", tmp_path / "schema.json"), ("12", "345")),
        (("--grammar", tmp_path / "grammar.lark"), ("xy",)),
        (("--regex", "(up|down)"), ("up", "down")),
        (("--choices", "left", "--choices", "right"), ("left", "right")),
    ):
        done = run_here(capsys, "run", model, "-p", PROMPT, "--json", *flags)
        assert json.loads(done.stdout)["text"] in texts
    check_error(run_here(capsys, "run", model, "-p", "x", "--regex", "("), "--regex: ")
    asked = ("eval", "--limit", 6, "--families", "addition", "--json", "--regex", "(?s).*answer 1")
    assert json.loads(run_here(capsys, *asked).stdout)["results"]
    missing = run_here(capsys, "run", model, "-p", "x", "--grammar", tmp_path / "none")
    check_error(missing, "none: no such file")


def test_without_llguidance_one_line_says_so(model: Path) -> None:
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "import sbd_engine\n"
        f"with sbd_engine.Engine({str(model)!r}) as engine:\n"
        "    print(engine.generate('x', max_tokens=2).finish_reason)\n"
        "    try: engine.generate('x', regex='a')\n"
        "    except sbd_engine.SbdError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout == "length\n`regex` needs llguidance: pip install 'llguidance>=1.9'\n"


def test_python_may_end_while_an_async_text_is_on_its_way(model: Path) -> None:
    code = (
        "import asyncio, sbd_engine\n"
        f"engine = sbd_engine.Engine({str(model)!r})\n"
        "async def main():\n"
        "    global stream\n"
        "    stream = engine.astream('x', max_tokens=400, regex='[a-z]{400}')\n"
        "    await anext(stream)\n"
        "asyncio.run(main())\n"
        "print('over')\n"
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=20
        )
        assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_the_lists_are_what_they_are_for() -> None:
    assert len(REGEXES) + len(GRAMMARS) + len(CHOICES) > 20
    assert len({json.dumps(schema(seed)) for seed in range(380)}) >= 300
