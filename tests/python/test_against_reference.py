"""The engine against the float64 reference: logits, and decoded tokens with their NFE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference.decoders import ntp_decode, sbd_decode
from reference.model import causal, with_block
from reference.random_model import RandomModel, random_model, write_checkpoint

from sbd_engine import Engine
from sbd_engine.convert import convert
from sbd_engine.errors import SbdValueError

from .decoded import check, untied
from .isas import ISAS

SEEDS = range(24)  # every combination of architecture, RoPE scaling and tying
INFINITY = float("inf")

# Largest logit error over the largest logit. float32 rounds at 6e-8, and these models amplify what
# enters a layer by up to a hundred. bf16 weights meet activations rounded to bf16 (2^-9), quantised
# ones activations rounded to 8 bits of their group's maximum (2^-8).
TOLERANCE = {"f32": 2e-5, "f16": 2e-5, "bf16": 6e-2, "q8_0": 2e-1, "q4_0": 2e-1}
# Typical error: root mean square over root mean square.
TYPICAL = {"f32": 2e-5, "f16": 2e-5, "bf16": 2e-2, "q8_0": 6e-2, "q4_0": 6e-2}


def converted(model: RandomModel, folder: Path, dtype: str = "f32") -> Path:
    path = folder / f"{dtype}.bin"
    convert([write_checkpoint(model, folder / "checkpoint")], path, type=dtype, warn=lambda _: None)
    return path


def agree(actual: NDArray[Any], expected: NDArray[Any], dtype: str) -> bool:
    """Within both tolerances; False where anything is NaN."""
    error = actual - expected
    largest = np.max(np.abs(error)) / np.max(np.abs(expected))
    typical = np.sqrt(np.mean(error**2) / np.mean(expected**2))
    return bool(largest <= TOLERANCE[dtype] and typical <= TYPICAL[dtype])


def test_the_comparison_can_fail() -> None:
    x = np.linspace(-1, 2, 50)
    assert agree(x, x, "f32")
    for wrong in (x * np.nan, -x, 0 * x, np.roll(x, 1), x + 1e-3):
        assert not agree(wrong, x, "f32")
    for wrong in (x * np.nan, -x, 0 * x):
        assert not agree(wrong, x, "q4_0")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SBD_ISA", request.param)
    return str(request.param)


def open_engine(path: Path, **options: Any) -> Engine:
    try:
        return Engine(path, **options)
    except SbdValueError as error:
        if "does not support" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_f32(seed: int, tmp_path: Path) -> None:
    model = random_model(seed)
    reference = model.reference()
    with Engine(converted(model, tmp_path), kv_dtype="f32") as engine:
        for n, block in ((1, 0), (1, 1), (40, 0), (40, 7), (200, 0), (200, 16), (33, 33)):
            ids = [*model.prompt(n - block), *[model.mask_id] * block]
            expected = reference.forward(ids, with_block(n, block) if block else causal(n))
            assert agree(engine.forward(ids, block), expected, "f32"), (n, block)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("seed", range(4))  # one of each architecture
def test_logits_of_every_type_and_instruction_set(
    seed: int, dtype: str, isa: str, tmp_path: Path
) -> None:
    model = random_model(seed, multiple_of_32=True)
    reference = model.rounded(dtype).reference()
    ids = model.prompt(60)
    with open_engine(converted(model, tmp_path, dtype), kv_dtype="f32") as engine:
        assert isa in engine.device
        for block in (0, 16):
            expected = reference.forward(ids, with_block(60, block) if block else causal(60))
            assert agree(engine.forward(ids, block), expected, dtype)


def test_f16_cache_is_close_and_the_default(tmp_path: Path) -> None:
    model = random_model(3)
    ids = model.prompt(120)
    expected = model.reference().forward(ids, causal(120))
    with Engine(converted(model, tmp_path)) as engine:
        error = np.max(np.abs(engine.forward(ids) - expected)) / np.max(np.abs(expected))
    assert 1e-6 < error < 1e-2  # keys and values are rounded to 11 bits, and only they


@pytest.mark.parametrize("seed", [1, 2, 10])  # whose heads have 32 values
def test_q8_0_cache_is_near(seed: int, isa: str, tmp_path: Path) -> None:
    """Keys and values are rounded to 8 bits of their group's maximum, and only they."""
    model = random_model(seed, multiple_of_32=True)
    ids = model.prompt(120)
    with open_engine(converted(model, tmp_path), kv_dtype="q8_0") as engine:
        for block in (0, 16):
            expected = model.reference().forward(
                ids, with_block(120, block) if block else causal(120)
            )
            error = engine.forward(ids, block) - expected
            typical = np.sqrt(np.mean(error**2) / np.mean(expected**2))
            assert 1e-4 < typical < TYPICAL["q8_0"]


def test_q8_0_cache_holds_whole_groups(tmp_path: Path) -> None:
    path = converted(random_model(3), tmp_path)
    said = "`kv_dtype` q8_0: expected a model whose heads have a multiple of 32 values, this one's"
    with pytest.raises(SbdValueError, match=said):
        Engine(path, kv_dtype="q8_0")


@pytest.mark.parametrize("seed", SEEDS)
def test_sbd_tokens_and_nfe(seed: int, tmp_path: Path) -> None:
    """5 gammas x 3 block sizes, max_tokens no multiple of a block. Prompts of 1 to 200 tokens stand
    before the largest blocks, which the reference has done soonest, of 1 to 60 before the others.
    """
    model = random_model(seed)
    reference = model.reference()
    random = np.random.default_rng(seed)
    with Engine(converted(model, tmp_path), kv_dtype="f32") as engine:
        for gamma in (0.0, 0.1, 0.35, 1.5, INFINITY):
            for block_size in (1, 4, 16):
                n = int(random.integers(1, 201 if block_size == 16 else 61))
                options: dict[str, Any] = {
                    "max_tokens": int(random.choice([5, 17, 21, 30])),
                    "gamma": gamma,
                    "block_size": block_size,
                    "ignore_eos": bool(random.integers(2)),
                }
                draw, expected = untied(
                    lambda draw, n=n, options=options: sbd_decode(
                        reference,
                        model.prompt(n, draw),
                        mask_id=model.mask_id,
                        eos_ids=model.eos_ids,
                        **options,
                    )
                )
                actual = engine.generate(model.prompt(n, draw), decoder="sbd", **options)
                check(actual, expected, (n, draw, options))
                if gamma == 0 and block_size == 1:
                    assert actual.stats.nfe == len(actual.tokens)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "rule",
    [
        {"unmask": "entropy_bounded", "proxy": "confidence", "gamma": 1.0},
        {"unmask": "entropy_bounded", "proxy": "margin", "gamma": 2.0},
        {"unmask": "factor", "factor": 1.2},
        {"unmask": "confidence", "confidence_threshold": 0.4},
        {"unmask": "top_n", "top_n": 3},
    ],
    ids=["proxy confidence", "proxy margin", "factor", "confidence", "top_n"],
)
def test_unmasking_rules(seed: int, rule: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(seed)
    reference = model.reference()
    options: dict[str, Any] = {"max_tokens": 37, "block_size": 8, "ignore_eos": True, **rule}
    draw, expected = untied(
        lambda draw: sbd_decode(reference, model.prompt(25, draw), mask_id=model.mask_id, **options)
    )
    with Engine(converted(model, tmp_path), kv_dtype="f32") as engine:
        actual = engine.generate(model.prompt(25, draw), decoder="sbd", **options)
    check(actual, expected, rule)
    assert actual.stats.tokens_per_forward == pytest.approx(37 / expected.nfe)


@pytest.mark.parametrize("seed", SEEDS)
def test_ntp_tokens(seed: int, tmp_path: Path) -> None:
    model = random_model(seed)
    reference = model.reference()
    n = 1 + 8 * seed
    ignore_eos = seed % 2 == 0
    draw, expected = untied(
        lambda draw: ntp_decode(
            reference, model.prompt(n, draw), 40, model.eos_ids, ignore_eos, mask_id=model.mask_id
        )
    )
    with Engine(converted(model, tmp_path), kv_dtype="f32") as engine:
        actual = engine.generate(
            model.prompt(n, draw), decoder="ntp", max_tokens=40, ignore_eos=ignore_eos
        )
    check(actual, expected, seed)
    assert actual.stats.nfe == len(actual.tokens)


@pytest.mark.parametrize("seed", range(8))
def test_context_end(seed: int, tmp_path: Path) -> None:
    """The last block has fewer rows where the context ends, and the text is cut there."""
    model = random_model(seed)
    reference = model.reference()
    sbd: dict[str, Any] = {"max_tokens": 100, "block_size": 16, "gamma": 0.5, "ignore_eos": True}
    draw, expected = untied(
        lambda draw: sbd_decode(
            reference, model.prompt(20, draw), mask_id=model.mask_id, n_ctx=45, **sbd
        )
    )
    with Engine(converted(model, tmp_path), kv_dtype="f32", n_ctx=45) as engine:
        actual = engine.generate(model.prompt(20, draw), decoder="sbd", **sbd)
        ntp = engine.generate(model.prompt(20), decoder="ntp", max_tokens=100, ignore_eos=True)
    check(actual, expected, seed)
    assert len(actual.tokens) == len(ntp.tokens) == 25
