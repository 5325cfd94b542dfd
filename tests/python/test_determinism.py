"""One result, bit for bit, on any thread count, alone or in a batch, streamed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference.random_model import RandomModel, random_model, write_checkpoint

from sbd_engine import Engine
from sbd_engine.convert import convert

# Of weights and cache
TYPES = (
    *(("f32", "f16"), ("f16", "f16"), ("bf16", "f16"), ("q8_0", "f16"), ("q4_0", "f16")),
    *(("f32", "q8_0"), ("q8_0", "q8_0")),
)


class Case(NamedTuple):
    model: RandomModel
    path: Path
    kv_dtype: str

    def engine(self, **options: Any) -> Engine:
        return Engine(self.path, kv_dtype=self.kv_dtype, **options)


@pytest.fixture(scope="module", params=TYPES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = random_model(7, multiple_of_32=True, layers=3)
    folder = tmp_path_factory.mktemp("determinism")
    path = folder / "model.bin"
    checkpoint = write_checkpoint(model, folder / "checkpoint")
    settings = ["sbd.dmtd.layers=1,1,1", "sbd.seed_slot=1", "sbd.decoders=nemotron,sbd,ntp"]
    dtype, kv_dtype = request.param
    convert([checkpoint], path, type=dtype, settings=settings, warn=lambda _: None)
    return Case(model, path, kv_dtype)


def requests(model: RandomModel) -> list[dict[str, Any]]:
    """Different methods, lengths and ways to draw, side by side."""
    shared = {"ignore_eos": True}
    return [
        {"prompt": model.prompt(3), "decoder": "ntp", "max_tokens": 30, **shared},
        {"prompt": model.prompt(150), "decoder": "sbd", "max_tokens": 41, "gamma": 0.5, **shared},
        {"prompt": model.prompt(1), "decoder": "sbd", "block_size": 5, "gamma": 0.0, **shared},
        {"prompt": model.prompt(40), "decoder": "sbd", "temperature": 0.8, "seed": 1, **shared},
        {
            "prompt": model.prompt(17),
            "decoder": "sbd",
            "unmask": "top_n",
            "top_n": 4,
            "temperature": 1.2,
            "top_k": 20,
            "top_p": 0.9,
            "seed": 2,
            **shared,
        },
        {"prompt": model.prompt(9), "decoder": "ntp", "temperature": 1.0, "seed": 3, **shared},
        {
            "prompt": model.prompt(20),
            "decoder": "sbd_lossless",
            "gamma": 1.0,
            "block_size": 16,
            **shared,
        },
        {"prompt": model.prompt(33), "decoder": "dmtd", "horizon": 3, **shared},
        {"prompt": model.prompt(8), "decoder": "dmtd", "temperature": 0.9, "seed": 4, **shared},
        {"prompt": model.prompt(70), "decoder": "d2f", "block_size": 8, **shared},
        {"prompt": model.prompt(5), "decoder": "d2f", "temperature": 0.7, "seed": 5, **shared},
        {"prompt": model.prompt(44), "decoder": "nemotron", "block_size": 8, **shared},
        {"prompt": model.prompt(21), "decoder": "nemotron_spec", "block_size": 4, **shared},
    ]


def test_threads_batches_and_streams_change_nothing(case: Case) -> None:
    model = case.model
    calls = requests(model)
    with case.engine(n_threads=1) as engine:
        alone = [engine.generate(**{"max_tokens": 64, **call}) for call in calls]
        logits = engine.forward(model.prompt(90), block=16)
    for n_threads in (1, 2, 3):
        with case.engine(n_threads=n_threads) as engine:
            assert np.array_equal(engine.forward(model.prompt(90), block=16), logits)
            batch = engine.generate_batch([{"max_tokens": 64, **call} for call in calls])
            for one, together, call in zip(alone, batch, calls, strict=True):
                assert together.tokens == one.tokens, call
                assert together.stats.nfe == one.stats.nfe, call
                streamed: list[int] = []
                for chunk in engine.stream(**{"max_tokens": 64, **call}):
                    streamed += chunk.tokens
                assert streamed == one.tokens, call
    assert len({tuple(one.tokens) for one in alone}) == len(alone)


def test_seeds(case: Case) -> None:
    model = case.model
    with case.engine() as engine:

        def draw(**options: Any) -> list[int]:
            return engine.generate(
                model.prompt(10), max_tokens=24, temperature=30.0, ignore_eos=True, **options
            ).tokens

        for decoder in ("ntp", "sbd", "d2f", "nemotron"):
            assert draw(seed=5, decoder=decoder) == draw(seed=5, decoder=decoder)
            texts = {tuple(draw(seed=seed, decoder=decoder)) for seed in range(8)}
            assert len(texts) == 8
            assert model.mask_id not in {token for text in texts for token in text}


def test_what_a_cache_keeps_changes_nothing(case: Case) -> None:
    """Texts behind what others left, cancelled ones among them."""
    calls = [{"max_tokens": 64, **call} for call in requests(case.model)]
    with case.engine(prefix_cache=0) as engine:
        alone = [engine.generate(**call).tokens for call in calls]
    with case.engine(prefix_cache=1 << 22) as engine:
        found = 0
        for call, tokens in zip(calls, alone, strict=True):
            stream = engine.stream(**call)
            next(iter(stream))
            stream.close()
            again = engine.generate(**call)
            assert again.tokens == tokens, call
            found += again.stats.cached_tokens
        assert found > 100


@pytest.mark.parametrize("decoder", ["sdar", "fast_dllm_v2", "llada", "dream"])
def test_block_families_over_a_q8_0_cache(decoder: str, tmp_path: Path) -> None:
    model = random_model(13, multiple_of_32=True, layers=2)
    path = tmp_path / "model.bin"
    settings = [f"sbd.decoders={decoder}", *([] if decoder == "dream" else ["sbd.block_size=32"])]
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    convert([checkpoint], path, type="f32", settings=settings, warn=lambda _: None)
    calls = [{"prompt": model.prompt(n), "max_tokens": 40, "ignore_eos": True} for n in (5, 40, 90)]
    with Engine(path, n_threads=1, kv_dtype="q8_0", prefix_cache=0) as engine:
        alone = [engine.generate(**call).tokens for call in calls]
    with Engine(path, n_threads=2, kv_dtype="q8_0") as engine:
        assert [done.tokens for done in engine.generate_batch(calls)] == alone
        again = [engine.generate(**call) for call in calls]
    assert [done.tokens for done in again] == alone
    assert again[2].stats.cached_tokens > 0
