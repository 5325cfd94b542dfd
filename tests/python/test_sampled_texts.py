"""Sampled texts: next-token decoding's stay what they were, those that are verified are the same,
and both are a float64 reference's."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from reference.random_model import random_model, write_checkpoint
from reference.sampling import Sampling, sampled_ntp_decode, sure_tokens

from sbd_engine import Engine
from sbd_engine.convert import convert
from sbd_engine.errors import SbdValueError
from sbd_engine.evaluation.questions import read_tasks
from sbd_engine.parameters import Parameters

from .isas import ISAS

PINNED: list[tuple[str, dict[str, Any], str]] = [
    (
        "def fibonacci(n):",
        {"temperature": 0.7, "seed": 3},
        "292 504 305 1129 342 27 325 340 305 292 340 1829 9 79 600 288 10 287 1829 9 79 600 342 10",
    ),
    (
        "Add 478 + 256\n",
        {"temperature": 1.2, "seed": 11},
        "25 287 350 287 297 286 288 21 13 360 288 200 24 287 332 287 288 286 288 20 13 360 288 200",
    ),
    (
        "class Stack:",
        {"temperature": 1.2, "seed": 4, "top_k": 20, "top_p": 0.9},
        "442 437 617 960 588 299 312 325 345 15 1195 286"
        " 1199 442 437 268 1602 9 299 13 731 312 325 345",
    ),
    (
        "import os\n",
        {"temperature": 0.7, "seed": 9, "sample_index": 2},
        "1190 647 352 1220 15 1289 1337 740 15 1495 292 1110 9 518 10 0 0 359 617 0 0 0 0 0",
    ),
]


def opened(**options: Any) -> Engine:
    try:
        return Engine(device="cpu", **options)
    except SbdValueError as error:
        assert "does not support" in str(error)
        pytest.skip(str(error))


@pytest.mark.parametrize("isa", ISAS)
def test_ntp(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBD_ISA", isa)
    # Where attention over an F16 cache multiplies in bf16, one of these is decided otherwise.
    kv_dtype = "f32" if isa == "avx512_bf16" else "f16"
    with opened(kv_dtype=kv_dtype) as engine:
        for prompt, sampling, tokens in PINNED:
            call = {"decoder": "ntp", "max_tokens": 24, "ignore_eos": True, **sampling}
            assert engine.generate(prompt, **call).tokens == [*map(int, tokens.split())], sampling


# Rules and filters, as arguments of generate.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k and top-p": {"top_k": 20, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "penalties": {
        "presence_penalty": 0.6,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
    },
    "bias": {"logit_bias": {40: 2.0, 41: -3.0, 50: 1.0}},
}
OFFERED = {f.name for f in fields(Parameters)}
WAYS = {name: way for name, way in WAYS.items() if OFFERED.issuperset(way)}
TEMPERATURES = (0.0, 0.7, 1.2)


def calls(n: int) -> list[dict[str, Any]]:
    """Of the shipped questions n, each with a temperature, a seed and a way of its own."""
    prompts = [question.prompt for question in read_tasks(None)]
    made = []
    for i, prompt in enumerate(prompts[:: max(1, len(prompts) // n)][:n]):
        temperature = TEMPERATURES[i % 3]
        way = list(WAYS.values())[i // 3 % len(WAYS)]
        if temperature == 0:
            way = {k: v for k, v in way.items() if k not in ("top_k", "top_p", "min_p")}
        made.append(
            {"prompt": prompt, "temperature": temperature, "seed": i, "max_tokens": 24, **way}
        )
    return made


def test_lossless_texts_are_ntps() -> None:
    """500 questions: alone and in batches beside other decoders, streamed, as far ahead as pays and
    in blocks of 8."""
    all_calls = calls(500)
    assert len(all_calls) == 500
    with Engine() as engine:
        expected = engine.generate_batch([{**call, "decoder": "ntp"} for call in all_calls])
        fixed = {"decoder": "sbd_lossless", "block_size": 8}
        ways_ahead = ({"decoder": "sbd_lossless"}, fixed, {"decoder": "sbd"}, fixed)
        done = engine.generate_batch(
            [{**call, **ways_ahead[i // 7 % 4]} for i, call in enumerate(all_calls)]
        )
        drafted = 0
        for i, (one, ntp) in enumerate(zip(done, expected, strict=True)):
            if one.stats.drafts is not None:
                assert one.tokens == ntp.tokens, all_calls[i]
                assert one.finish_reason == ntp.finish_reason
                drafted += one.stats.drafts.accepted
        assert drafted > 1000
        for call, ntp in list(zip(all_calls, expected, strict=True))[::25]:
            for ahead in ({"decoder": "sbd_lossless"}, {"decoder": "nemotron_spec"}, fixed):
                with engine.stream(**call, **ahead) as stream:
                    streamed = [token for chunk in stream for token in chunk.tokens]
                assert streamed == ntp.tokens


@pytest.mark.parametrize("isa", ISAS)
def test_lossless_texts_are_ntps_on_every_instruction_set(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBD_ISA", isa)
    with opened() as engine:
        for call in calls(10):
            ntp = engine.generate(**call, decoder="ntp")
            for block_size in (None, 8):
                done = engine.generate(**call, decoder="sbd_lossless", block_size=block_size)
                assert done.tokens == ntp.tokens, call


@pytest.mark.parametrize("seed", range(20))
def test_sampled_texts_are_the_references(seed: int, tmp_path: Path) -> None:
    """Of NTP and of what is verified, up to the first token that float32 may see otherwise."""
    model = random_model(seed, steady=True)
    reference = model.reference()
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    settings = ["sbd.seed_slot=1", "sbd.block_size=8"]
    convert(
        [checkpoint], tmp_path / "model.bin", type="f32", settings=settings, warn=lambda _: None
    )
    sure = 0
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        for i, rules in enumerate(WAYS.values()):
            way = {"temperature": TEMPERATURES[(seed + i) % 2 + 1], "seed": seed, **rules}
            prompt = model.prompt(7 + i, seed)
            tokens, margins = sampled_ntp_decode(
                reference,
                prompt,
                16,
                Sampling(**way),
                model.eos_ids,
                mask_id=model.mask_id,
                ignore_eos=True,
            )
            n = sure_tokens(margins, 1e-3)
            sure += n
            texts = [
                engine.generate(
                    prompt, decoder=decoder, block_size=size, max_tokens=16, ignore_eos=True, **way
                ).tokens
                for decoder, size in (
                    ("ntp", None),
                    ("sbd_lossless", None),
                    ("sbd_lossless", 5),
                    ("nemotron_spec", None),
                    ("nemotron_spec", 8),
                )
            ]
            assert texts[0][:n] == tokens[:n], way
            assert all(text == texts[0] for text in texts), way
    assert sure > 8 * len(WAYS)
